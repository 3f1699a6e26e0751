"""Channels in another order, so that an N:M pattern keeps more: the network computes the same."""

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
from prunella.model.copying import copied
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.registry.method import search
from prunella.stats.subject import Subject, first_seen
from prunella.types import Inputs

_EXHAUSTIVE = 4
"""Up to this M, two stripes are regrouped in all ways (35 for M=4); beyond it only single columns change places."""


@dataclass(frozen=True)
class Permuted:
    """A model whose channels have another order.

    orders: group -> which old unit stands at each place. before, after: magnitude that the pattern keeps of the layers
    that read these groups, summed. left: (group, why it keeps its order).
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
        return "\n".join([*lines, *(f"  {name} stays: {why}" for name, why in self.left)])


@search(source="Pool and Yu 2021, Channel Permutations for N:M Sparsity, NeurIPS 34")
def permute(
    model: nn.Module, inputs: Inputs, pattern: NM, *, rounds: int = 50, seed: int = 0, skip: Sequence[str] = ()
) -> Permuted:
    """Give coupled channels an order in which `pattern` keeps more magnitude; the network's function stays.

    Maximizes `sum |W|` over what `NM(n, m)` keeps, of all layers that read a group, by greedy steps: in every round the
    stripes of M channels are paired at random, and each pair is regrouped in the best of all ways (35 for M = 4; single
    swaps beyond), if that is better. Groups of two stripes of single columns are thereby solved exactly. The order is
    that of everything coupled with the channels: producers' rows, biases, normalizations, readers' columns. Every group
    is compared with the original in float64 on the example; one that does not compute the same keeps its order, and so
    do heads, experts, blocks and tokens. Data: none. `model` is left as it is; plan on `Permuted.model`.
    rounds: at least 1; stops before where a round of all pairs finds nothing. seed: of the pairing. skip: as in `plan`.

    Use: before N:M masks without retraining; it costs nothing at run time. Avoid: one-layer models and the layer that
    reads the input, whose columns cannot move.
    """
    model = unwrap(model)
    if rounds < 1:
        raise RequestError(f"rounds={rounds} searches nothing", "at least 1 is needed", "for example rounds=50")
    with untouched(model, seed):
        graph = couple(model, inputs)
        check_patterns(graph, skip, ())
        twin = copied(model)
        orders: dict[str, Tensor] = {}
        left: list[tuple[str, str]] = []
        before = after = 0.0
        for group in graph.groups:
            readers = _readers(twin, graph, group, pattern)
            reason = chosen(names_of_group(graph, group), skip, ()) or _unfit(group, pattern, readers)
            if reason:
                left.append((group.name, reason))
                continue
            order, start, end = best_order(readers, pattern, group.size, rounds, seed)
            if end > start:
                reason = _moved(twin, group, order, inputs)
            if reason:
                left.append((group.name, reason))
                end = start
            elif end > start:
                orders[group.name] = order
            before, after = before + start, after + end
    return Permuted(twin, orders, before, after, tuple(left))


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group, whose magnitudes are `matrix` (out, in).

    columns: (units, w), the columns at each unit's place. m: units in a stripe.
    """

    matrix: Tensor
    columns: Tensor
    m: int

    @cached_property
    def slots(self) -> Tensor:
        """The columns of a stripe in ascending order, as numbers into `columns` of its units one after the other."""
        return self.columns[: self.m].flatten().argsort()

    def striped(self) -> bool:
        """Whether every stripe of M units covers whole groups of M columns, and all stripes in the same way."""
        m, units = self.m, len(self.columns)
        if units % m:
            return False
        columns = self.columns.view(units // m, -1)[:, self.slots].view(units // m, -1, m)
        whole = (columns[..., :1] % m == 0) & (columns == columns[..., :1] + torch.arange(m))
        return bool(whole.all())

    def kept(self, units: Tensor, n: int) -> Tensor:
        """What N:M keeps of stripes with these units at their places: `(stripes, M)` -> `(stripes,)`."""
        stripes, m = units.shape
        values = self.matrix[:, self.columns[units].view(stripes, -1)[:, self.slots]]
        return values.view(len(self.matrix), stripes, -1, m).topk(n, -1).values.sum((0, 2, 3), dtype=torch.float64)


def best_order(
    readers: Sequence[Reader], pattern: NM, size: int, rounds: int, seed: int
) -> tuple[Tensor, float, float]:
    """The order found, and the magnitude kept before and after."""
    stripes = torch.arange(size).view(-1, pattern.m)
    ways = _ways(pattern.m)
    generator = torch.Generator().manual_seed(seed)
    value = _kept(readers, stripes, pattern.n)
    start = float(value.sum())
    for _ in range(rounds):
        improved = False
        for pairs in _matchings(len(stripes), generator):
            improved |= _regroup(readers, stripes, value, pairs, ways, pattern.n)
        if not improved:
            break
    return stripes.flatten(), start, float(value.sum())


def _regroup(readers: Sequence[Reader], stripes: Tensor, value: Tensor, pairs: Tensor, ways: Tensor, n: int) -> bool:
    """The best way for every pair of stripes, in place; whether one was better."""
    if not len(pairs):
        return False
    m = stripes.shape[1]
    units = stripes[pairs].view(len(pairs), 2 * m)[:, ways]
    kept = _kept(readers, units.view(-1, m), n).view(len(pairs), len(ways), 2)
    best = kept.sum(2).argmax(1)
    rows = torch.arange(len(pairs))
    better = kept.sum(2)[rows, best] > value[pairs].sum(1) * (1 + 1e-9)
    found = units[rows, best].view(len(pairs), 2, m)
    stripes[pairs[better]] = found[better]
    value[pairs[better]] = kept[rows, best][better]
    return bool(better.any())


def _kept(readers: Sequence[Reader], stripes: Tensor, n: int, chunk: int = 4096) -> Tensor:
    return torch.cat([sum((r.kept(part, n) for r in readers), torch.zeros(())) for part in torch.split(stripes, chunk)])


def _matchings(stripes: int, generator: torch.Generator) -> list[Tensor]:
    """Every pair of stripes once, in rounds in which no stripe comes twice (a tournament), shuffled."""
    places = torch.randperm(stripes + stripes % 2, generator=generator)
    found = []
    for _ in range(len(places) - 1):
        pairs = torch.stack([places[: len(places) // 2], places[len(places) // 2 :].flip(0)], 1)
        found.append(pairs[(pairs < stripes).all(1)])
        places = torch.cat([places[:1], places[1:].roll(1)])
    return found


def _ways(m: int) -> Tensor:
    """Regroupings of two stripes, `(ways, 2 m)`: all canonical partitions for small M, else single swaps."""
    whole = range(2 * m)
    if m <= _EXHAUSTIVE:
        firsts = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
        return torch.tensor([[*first, *(i for i in whole if i not in first)] for first in firsts])
    ways = [list(whole)]
    for a, b in itertools.product(range(m), range(m, 2 * m)):
        swapped = list(whole)
        swapped[a], swapped[b] = b, a
        ways.append(swapped)
    return torch.tensor(ways)


def _readers(model: nn.Module, graph: Graph, group: Group, pattern: NM) -> list[Reader]:
    """Layers whose columns follow the group in whole stripes; others move along, but have no say."""
    weights = Subject(model, graph).parameters
    layers = {layer.entity: layer for layer in first_seen(graph.layers)}
    found = []
    for member in group.members:
        layer = layers.get(member.entity)
        if layer is None or member.role != "in" or member.axis != layer.in_axis or layer.groups > 1:
            continue
        matrix = to_matrix(weights[member.entity].detach().abs(), layer).cpu()
        kernel = matrix.shape[1] // weights[member.entity].shape[layer.in_axis]
        places = _places(group, member.index, member.unit)
        if places is None or matrix.shape[1] % pattern.m:
            continue
        columns = (places.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)
        reader = Reader(matrix, columns, pattern.m)
        found += [reader] if reader.striped() else []
    return found


def _places(group: Group, index: object, unit: object) -> Tensor | None:
    """Positions by unit, `(units, k)`; None where units have different numbers of them."""
    at, of = torch.as_tensor(index), torch.as_tensor(unit)
    counts = torch.bincount(of, minlength=group.size)
    if not bool((counts == counts[0]).all()):
        return None
    return at[of.argsort(stable=True)].view(group.size, -1)


def _unfit(group: Group, pattern: NM, readers: Sequence[Reader]) -> str:
    if group.kind not in ("channel", "width"):
        return f"units of kind {group.kind} have an order of their own"
    if any(_places(group, member.index, member.unit) is None for member in group.members):
        return "its units have different numbers of positions in one parameter"
    if group.size < 2 * pattern.m:
        return f"{group.size} units are fewer than two stripes of {pattern.m}"
    return "" if readers else f"no layer reads it in whole stripes of {pattern.m}"


def _moved(model: nn.Module, group: Group, order: Tensor, inputs: Inputs) -> str:
    """Put the units in that order, in place, if the model computes the same; else why not."""
    cuts: dict[str, dict[int, Tensor]] = {}
    sizes = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for member in group.members:
        places = _places(group, member.index, member.unit)
        assert places is not None
        axes = cuts.setdefault(member.entity, {})
        moved = axes.setdefault(member.axis, torch.arange(sizes[member.entity].shape[member.axis]))
        moved[places.flatten()] = places[order].flatten()
    small = copied(model)
    cut_(small, cuts, {})
    try:
        found = verify(model, small, Changes(), inputs)
    except NotSupported as error:
        return f"the model does not run in that order: {error.why}"
    if not found.exact:
        return f"the order matters to the model: relative error {found.error:.1e}"
    cut_(model, cuts, {})
    return ""
