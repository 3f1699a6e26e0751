"""Permutations of channels for N:M patterns: the pattern keeps more, the function of the network is unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import NM
from prunella.graph.cut.changes import Changes
from prunella.graph.cut.surgery import cut_
from prunella.graph.data import Graph, Group
from prunella.graph.match import check_patterns, chosen, names_of_group
from prunella.graph.matrix import to_matrix
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.model.constants import constants
from prunella.model.copying import copied
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.registry.method import search
from prunella.stats.subject import Subject, first_seen
from prunella.types import Inputs

_EXHAUSTIVE = 4
"""Up to this M, two stripes are regrouped in all ways (35 for M=4); for larger M by swaps of single columns."""


@dataclass(frozen=True)
class Permuted:
    """A model with permuted channels.

    orders: group -> old number of the unit at each position. before, after: total magnitude that the pattern keeps in
    the layers that read these groups. left: (group, why its order is unchanged).
    """

    model: nn.Module
    orders: Mapping[str, Tensor]
    before: float
    after: float
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        gain = f" (+{self.after / self.before - 1:.2%})" if self.before else ""
        lines = [
            f"{len(self.orders)} groups in a new order: kept magnitude {self.before:.6g} -> {self.after:.6g}{gain}"
        ]
        return "\n".join([*lines, *(f"  {name} is unchanged: {why}" for name, why in self.left)])


@search(source="Pool and Yu 2021, Channel Permutations for N:M Sparsity, NeurIPS 34")
def permute(
    model: nn.Module, inputs: Inputs, pattern: NM, *, rounds: int = 50, seed: int = 0, skip: Sequence[str] = ()
) -> Permuted:
    """Permute coupled channels so that `pattern` keeps more magnitude, without a change of the network's function.

    Maximizes `sum |W|` over the positions that `NM(n, m)` keeps, of all layers that read a group, by greedy steps. In
    every round the stripes of M channels are paired at random. Each pair takes the best of all regroupings (35 for M =
    4; single swaps beyond), if it is better. This solves groups of two stripes of single columns exactly. The
    permutation covers all slices coupled with the channels: producers' rows, biases, normalizations, readers' columns.
    Every group is compared with the original in float64 on the example. A group that does not compute the same keeps
    its order, as do heads, experts, blocks and tokens. Data: none. `model` does not change; plan on `Permuted.model`.
    rounds: at least 1; the search stops when a round of all pairs finds no gain. seed: of the pairing. skip: as in
    `plan`.
    Errors: RequestError for rounds below 1.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> x = torch.randn(4, 8)
        >>> permuted = pr.transform.permute(model, x, pr.NM(2, 4), rounds=2)
        >>> torch.allclose(permuted.model(x), model(x), atol=1e-5)
        True

    Use: before N:M masks without retraining, at no cost at run time. Avoid: one-layer models and the layer that reads
    the input, whose columns cannot be permuted.
    """
    model = unwrap(model)
    if rounds < 1:
        raise RequestError(f"rounds={rounds} is out of range", "at least 1 round is needed", "for example rounds=50")
    with untouched(model, seed):
        graph = couple(model, inputs)
        check_patterns(graph, skip, ())
        permuted = copied(model)
        orders: dict[str, Tensor] = {}
        unchanged: list[tuple[str, str]] = []
        before = after = 0.0
        for group in graph.groups:
            readers = _readers(permuted, graph, group, pattern)
            reason = chosen(names_of_group(graph, group), skip, ()) or _unfit(group, pattern, readers)
            if reason:
                unchanged.append((group.name, reason))
                continue
            order, start, end = best_order(readers, pattern, group.size, rounds, seed)
            if end > start:
                reason = _moved(permuted, group, order, inputs)
            if reason:
                unchanged.append((group.name, reason))
                end = start
            elif end > start:
                orders[group.name] = order
            before, after = before + start, after + end
    return Permuted(permuted, orders, before, after, tuple(unchanged))


@dataclass(frozen=True)
class PermutedReader:
    """A layer that reads a group; `matrix` (out, in) holds its magnitudes.

    columns: (units, w), the columns of each unit. m: units in a stripe.
    """

    matrix: Tensor
    columns: Tensor
    m: int

    @cached_property
    def slots(self) -> Tensor:
        """Ascending order of the columns of a stripe, as indices into the joined `columns` of its units."""
        return self.columns[: self.m].flatten().argsort()

    def striped(self) -> bool:
        """Whether every stripe of M units covers whole groups of M columns, and all stripes in the same way."""
        m, units = self.m, len(self.columns)
        if units % m:
            return False
        columns = self.columns.view(units // m, -1)[:, self.slots].view(units // m, -1, m)
        aligned = (columns[..., :1] % m == 0) & (columns == columns[..., :1] + torch.arange(m, device="cpu"))
        return bool(aligned.all())

    def kept(self, units: Tensor, n: int) -> Tensor:
        """Magnitude that N:M keeps in stripes of these units: `(stripes, M)` -> `(stripes,)`."""
        stripes, m = units.shape
        values = self.matrix[:, self.columns[units].view(stripes, -1)[:, self.slots]]
        return values.view(len(self.matrix), stripes, -1, m).topk(n, -1).values.sum((0, 2, 3), dtype=torch.float64)


def best_order(
    readers: Sequence[PermutedReader], pattern: NM, size: int, rounds: int, seed: int
) -> tuple[Tensor, float, float]:
    """The best order, and the magnitude kept before and after."""
    stripes = torch.arange(size, device="cpu").view(-1, pattern.m)
    regroupings = _regroupings(pattern.m)
    generator = torch.Generator().manual_seed(seed)
    value = _kept(readers, stripes, pattern.n)
    start = float(value.sum())
    for _ in range(rounds):
        improved = False
        for pairs in _matchings(len(stripes), generator):
            improved |= _regroup(readers, stripes, value, pairs, regroupings, pattern.n)
        if not improved:
            break
    return stripes.flatten(), start, float(value.sum())


def _regroup(
    readers: Sequence[PermutedReader], stripes: Tensor, value: Tensor, pairs: Tensor, regroupings: Tensor, n: int
) -> bool:
    """Regroup every pair of stripes in the best way, in place; True if any pair improved."""
    if not len(pairs):
        return False
    m = stripes.shape[1]
    units = stripes[pairs].view(len(pairs), 2 * m)[:, regroupings]
    kept = _kept(readers, units.view(-1, m), n).view(len(pairs), len(regroupings), 2)
    best = kept.sum(2).argmax(1)
    rows = torch.arange(len(pairs), device="cpu")
    better = kept.sum(2)[rows, best] > value[pairs].sum(1) * (1 + 1e-9)
    regrouped = units[rows, best].view(len(pairs), 2, m)
    stripes[pairs[better]] = regrouped[better]
    value[pairs[better]] = kept[rows, best][better]
    return bool(better.any())


def _kept(readers: Sequence[PermutedReader], stripes: Tensor, n: int, chunk: int = 4096) -> Tensor:
    return torch.cat(
        [sum((r.kept(part, n) for r in readers), torch.zeros((), device="cpu")) for part in torch.split(stripes, chunk)]
    )


def _matchings(stripes: int, generator: torch.Generator) -> list[Tensor]:
    """Every pair of stripes once, shuffled, in rounds without a repeated stripe (a tournament)."""
    places = torch.randperm(stripes + stripes % 2, generator=generator, device="cpu")
    matchings = []
    for _ in range(len(places) - 1):
        pairs = torch.stack([places[: len(places) // 2], places[len(places) // 2 :].flip(0)], 1)
        matchings.append(pairs[(pairs < stripes).all(1)])
        places = torch.cat([places[:1], places[1:].roll(1)])
    return matchings


def _regroupings(m: int) -> Tensor:
    """Regroupings of two stripes, `(regroupings, 2 m)`: all canonical partitions for small M, else single swaps."""
    units = range(2 * m)
    if m <= _EXHAUSTIVE:
        firsts = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
        return torch.tensor([[*first, *(i for i in units if i not in first)] for first in firsts], device="cpu")
    regroupings = [list(units)]
    for a, b in itertools.product(range(m), range(m, 2 * m)):
        swapped = list(units)
        swapped[a], swapped[b] = b, a
        regroupings.append(swapped)
    return torch.tensor(regroupings, device="cpu")


def _readers(model: nn.Module, graph: Graph, group: Group, pattern: NM) -> list[PermutedReader]:
    """Layers whose columns follow the group in whole stripes. Other layers are permuted too but do not decide."""
    weights = Subject(model, graph).parameters
    layers = {layer.entity: layer for layer in first_seen(graph.layers)}
    readers = []
    for member in group.members:
        layer = layers.get(member.entity)
        if layer is None or member.role != "in" or member.axis != layer.in_axis or layer.groups > 1:
            continue
        matrix = to_matrix(weights[member.entity].detach().abs(), layer).cpu()
        kernel = matrix.shape[1] // weights[member.entity].shape[layer.in_axis]
        places = _places(group, member.index, member.unit)
        if places is None or matrix.shape[1] % pattern.m:
            continue
        columns = (places.unsqueeze(2) * kernel + torch.arange(kernel, device="cpu")).flatten(1)
        reader = PermutedReader(matrix, columns, pattern.m)
        readers += [reader] if reader.striped() else []
    return readers


def _places(group: Group, index: object, unit: object) -> Tensor | None:
    """Positions by unit, `(units, k)`; None if units have different numbers of positions."""
    at, of = torch.as_tensor(index, device="cpu"), torch.as_tensor(unit, device="cpu")
    counts = torch.bincount(of, minlength=group.size)
    if not bool((counts == counts[0]).all()):
        return None
    return at[of.argsort(stable=True)].view(group.size, -1)


def _unfit(group: Group, pattern: NM, readers: Sequence[PermutedReader]) -> str:
    if group.kind not in ("channel", "width"):
        return f"units of kind {group.kind} have a fixed order"
    if any(_places(group, member.index, member.unit) is None for member in group.members):
        return "its units have different numbers of positions in one parameter"
    if group.size < 2 * pattern.m:
        return f"{group.size} units are fewer than two stripes of {pattern.m}"
    return "" if readers else f"no layer reads it in whole stripes of {pattern.m}"


def _moved(model: nn.Module, group: Group, order: Tensor, inputs: Inputs) -> str:
    """Permute the units in place if the model computes the same. Returns the reason if it does not, else empty."""
    cuts: dict[str, dict[int, Tensor]] = {}
    sizes = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **constants(model),
    }
    for member in group.members:
        places = _places(group, member.index, member.unit)
        assert places is not None
        axes = cuts.setdefault(member.entity, {})
        positions = axes.setdefault(member.axis, torch.arange(sizes[member.entity].shape[member.axis], device="cpu"))
        positions[places.flatten()] = places[order].flatten()
    permuted = copied(model)
    cut_(permuted, cuts, {})
    try:
        verification = verify(model, permuted, Changes(), inputs)
    except NotSupported as error:
        return f"the model does not run in this order: {error.why}"
    if not verification.exact:
        return f"the order matters to the model: relative error {verification.error:.1e}"
    cut_(model, cuts, {})
    return ""
