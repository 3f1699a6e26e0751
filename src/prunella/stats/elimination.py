"""Optimal brain surgeon for units: eliminate the unit with the least loss after an update of its readers' weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunella.errors import BadInput
from prunella.graph.data import Group
from prunella.model.device import home_of_sums
from prunella.model.forward import real_tokens
from prunella.model.observed_reads import Read
from prunella.model.watch import Watch
from prunella.stats.subject import Subject
from prunella.types import Gram, Mask

CHUNK = 12
"""At most one in `CHUNK` of the remaining units is removed before the costs are computed again."""


class Quadratic(NamedTuple):
    """One matrix that reads a group: weight `(out, in)`, Gram matrix `(in, in)` of its inputs, unit of each column.

    units: -1 for columns of no unit. mean: of the inputs, `(in,)`; zero unless the inputs are centered. scale: of each
    output in the normalization that reads it, `(out,)`; None without one.
    """

    weight: Tensor
    gram: Gram
    units: Tensor
    mean: Tensor
    scale: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """The weight with the scales of the normalization that reads its outputs."""
        return self.weight if self.scale is None else self.weight * self.scale[:, None]


class Removal(NamedTuple):
    """order: units in the order of removal. losses: `(units,)`, relative, without a unit and all units before it."""

    order: Tensor
    losses: Tensor


def eliminate(readers: Sequence[Quadratic], units: int, *, ridge: float = 1e-3) -> Removal:
    """Remove the unit whose loss is smallest, update the other weights, and repeat.

    The loss of unit c is `sum_readers tr(W_c ([H^-1]_cc)^-1 W_c^T)` with `H = G + ridge * mean(diag G) I`; then `W -=
    W_c ([H^-1]_cc)^-1 [H^-1]_c:` and the inverse is downdated. `losses` are relative to `tr(W G W^T)` of the dense
    weights, and add up in the order of removal: each is the relative squared error of the outputs without all units up
    to this one. O(in^3) for each reader.
    """
    parts = [_Part.of(reader, units, ridge) for reader in readers]
    scale = sum(float((r.seen @ r.gram * r.seen).sum()) for r in readers) or 1.0
    left, losses = torch.arange(units, device="cpu"), torch.zeros(units, dtype=torch.float64, device="cpu")
    order, total = list[int](), 0.0
    while len(left):
        costs = torch.stack([part.costs(left) for part in parts]).sum(0)
        chosen = costs.argsort(stable=True)[: max(1, len(left) // CHUNK)]
        removed = left[chosen]
        for unit, cost in zip(removed.tolist(), costs[chosen].tolist(), strict=True):
            total += max(cost, 0.0)
            losses[unit] = total / scale
            order.append(unit)
        for part in parts:
            part.remove(removed)
        kept = torch.ones(len(left), dtype=torch.bool, device="cpu")
        kept[chosen] = False
        left = left[kept]
    return Removal(torch.tensor(order, dtype=torch.long, device="cpu"), losses)


def compensated(reader: Quadratic, keep: Mask, *, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The best weights `(out, in)` without the units that are not kept, and the constant `(out,)` that goes with them.

    `min over W' of |(W - W') X|^2 + ridge * mean(diag G) |W - W'|^2` with zeros in the removed columns: `W'_K = W_K +
    W_R G_RK (G_KK + ridge * mean(diag G) I)^-1`. The constant restores the mean of the outputs for centered inputs.
    """
    removed = torch.zeros(len(reader.units), dtype=torch.bool, device="cpu")
    removed[reader.units >= 0] = ~keep[reader.units[reader.units >= 0]]
    kept = ~removed
    weight, gram = reader.weight, reader.gram
    damped = gram[kept][:, kept] + _damping(gram, ridge) * torch.eye(int(kept.sum()), dtype=gram.dtype, device="cpu")
    change = torch.linalg.solve(damped, (weight[:, removed] @ gram[removed][:, kept]).T).T
    new = torch.zeros_like(weight)
    new[:, kept] = weight[:, kept] + change
    return new, (weight - new) @ reader.mean


@dataclass
class _Part:
    """One reader during the elimination: `columns` `(units, width)`, padded with a column of zeros."""

    weight: Tensor
    inverse: Tensor
    columns: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, reader: Quadratic, units: int, ridge: float) -> _Part:
        damped = reader.gram + _damping(reader.gram, ridge) * torch.eye(
            len(reader.gram), dtype=reader.gram.dtype, device="cpu"
        )
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        sizes = torch.bincount(reader.units[reader.units >= 0], minlength=units)
        pad = len(reader.units)  # a column of weight 0 whose inverse block is the identity
        columns = torch.full((units, max(1, int(sizes.max()))), pad, dtype=torch.long, device="cpu")
        for unit in range(units):
            columns[unit, : int(sizes[unit])] = (reader.units == unit).nonzero()[:, 0]
        weight = torch.nn.functional.pad(reader.seen, (0, 1))
        inverse = torch.nn.functional.pad(inverse, (0, 1, 0, 1))
        return cls(weight.clone(), inverse, columns, sizes)

    def costs(self, units: Tensor) -> Tensor:
        columns = self.columns[units]
        if columns.shape[1] == 1:  # blocks of one number need no solver
            diagonal = self._blocks(columns)[:, 0, 0]
            costs: Tensor = self.weight[:, columns[:, 0]].square().sum(0) / diagonal
            return costs
        weights = self.weight[:, columns].permute(1, 2, 0)  # (units, width, out)
        solved: Tensor = torch.linalg.solve(self._blocks(columns), weights)
        return (weights * solved).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Remove units together, which gives the same as one after the other, and close the gaps."""
        kept = torch.ones(len(self.inverse), dtype=torch.bool, device="cpu")
        kept[self.columns[units].flatten()] = False
        kept[-1] = True  # the column of zeros
        removed = (~kept).nonzero()[:, 0]
        if len(removed):
            rows = torch.linalg.solve(self.inverse[removed][:, removed], self.inverse[removed][:, kept])
            self.weight = self.weight[:, kept] - self.weight[:, removed] @ rows
            self.inverse = self.inverse[kept][:, kept] - self.inverse[kept][:, removed] @ rows
            self.columns = (kept.cumsum(0) - 1)[self.columns]

    def _blocks(self, columns: Tensor) -> Tensor:
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        padded = (columns == len(self.inverse) - 1).to(blocks.dtype)
        return blocks + torch.diag_embed(padded)


def _damping(gram: Gram, ridge: float) -> float:
    """The ridge times the mean diagonal; 1 for a layer without inputs."""
    return ridge * float(gram.diagonal().mean()) or 1.0


# -- gathering -----------------------------------------------------------------------------------------------------


FEW, TOKENS = 8192, 16
"""Most tokens taken from one call, in total and per input: neighboring pixels are similar."""


def spread(tokens: int, inputs: int) -> Tensor | None:
    """The tokens to take from one call; None for all.

    They are spread by the golden ratio, so that no period, such as the width of an image, biases the choice.
    """
    most = max(FEW, TOKENS * inputs)
    if tokens <= most:
        return None
    return (torch.arange(most, dtype=torch.float64, device="cpu") * 0.6180339887498949 % 1 * tokens).long()


def chosen_tokens(read: Read, real: Tensor | None) -> Tensor | None:
    """The tokens of one call that count: without padding, and a sample if there are many; None for all.

    real: which tokens of the batch are not padding, one after the other.
    """
    padded = real is not None and len(real) == read.tokens
    chosen = real.nonzero()[:, 0] if padded and real is not None else None
    places = spread(read.tokens if chosen is None else len(chosen), read.form.sizes(read.view.size)[2])
    return chosen if places is None else places if chosen is None else chosen[places]


def column_sums(x: Tensor) -> Tensor:
    """`x.sum(0)` in float64, of products with ones that add some thousand rows in the precision of x: much quicker."""
    ones = x.new_ones(1, min(FEW, len(x)))
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=home_of_sums(x.device))
    for part in torch.split(x, FEW):
        total += (ones[:, : len(part)] @ part)[0].to(total.device)
    return total


@dataclass
class Covariance:
    """Count, mean and Gram matrix of the inputs of one matrix, over batches, in float64."""

    centered: bool
    tokens: int = 0
    origin: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    total: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    products: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))

    def add(self, x: Tensor) -> None:
        """Add tokens, `(tokens, in)`."""
        if not self.tokens:
            self.origin = x.mean(0, dtype=torch.float64) if self.centered else x.new_zeros(x.shape[1]).double()
            self.total = torch.zeros_like(self.origin)
            self.products = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        x = x.to(x.dtype if x.dtype.itemsize >= 4 else torch.float32)
        x = x - self.origin.to(x.dtype) if self.centered else x
        self.tokens += len(x)
        self.total += column_sums(x)
        for part in torch.split(x, FEW):  # products of a few tokens in the precision of the model, their sum in float64
            self.products += part.T @ part

    @property
    def gram(self) -> Gram:
        """`X^T X`, of centered inputs if requested."""
        return self.products - torch.outer(self.total, self.total) / self.tokens if self.centered else self.products

    @property
    def mean(self) -> Tensor:
        """The mean of the inputs; zero if they are not centered."""
        return self.origin + self.total / self.tokens if self.centered else torch.zeros_like(self.origin)


@dataclass
class ReaderOfUnits:
    """A matrix that reads a group: its read, its number in the weight, and its statistics."""

    name: str
    read: Read
    matrix: int
    covariance: Covariance

    def quadratic(self, units: Tensor) -> Quadratic:
        """The quadratic problem. units: the unit of each position of the weight, -1 for none."""
        weight = self.read.matrices()[self.matrix].double().cpu()
        of_columns = self.read.matrices(units)[self.matrix][0].cpu()
        norm = self.read.norm
        scale = None if norm is None else norm.scale.view(self.read.groups, -1)[self.matrix].cpu()
        return Quadratic(weight, self.covariance.gram.cpu(), of_columns, self.covariance.mean.cpu(), scale)


class Readers:
    """The inputs of every matrix that reads one of the groups."""

    def __init__(self, parameters: Mapping[str, Tensor], groups: Iterable[Group]) -> None:
        self._groups = {group.name: group for group in groups if not group.paths}
        names = {m.entity for group in self._groups.values() for m in group.members if m.role == "in"}
        self._weights = {name: p for name in names if isinstance(p := parameters.get(name), nn.Parameter)}
        self._name_of = {id(p): name for name, p in self._weights.items()}
        self._found: dict[tuple[Any, ...], ReaderOfUnits] = {}

    @contextmanager
    def watch(self, real: Tensor | None = None) -> Iterator[None]:
        """Watch one forward pass. real: which tokens are not padding, one after the other."""
        watch = Watch(self._weights.values(), lambda read: self._add(read, real))
        with watch:
            yield
        watch.finish()

    def _add(self, read: Read, real: Tensor | None) -> None:
        name = self._name_of[id(read.weight)]
        shifts = read.bias is not None or read.norm is not None
        for matrix in range(read.groups):
            key = (name, read.view, matrix)
            if key not in self._found:
                self._found[key] = ReaderOfUnits(name, read.bare, matrix, Covariance(shifts))
            tokens = chosen_tokens(read, real)
            chunks = read.columns(matrix) if tokens is None else [(read.columns_at(tokens, matrix), slice(None))]
            for x, _ in chunks:
                if len(x):
                    self._found[key].covariance.add(x.detach())

    @property
    def order(self) -> tuple[str, ...]:
        """The groups in the order in which the model first reads them."""
        called = list(dict.fromkeys(reader.name for reader in self._found.values()))
        first = {
            name: min(places)
            for name, group in self._groups.items()
            if (places := [called.index(m.entity) for m in group.members if m.role == "in" and m.entity in called])
        }
        return tuple(sorted(first, key=first.__getitem__))

    def weights(self, name: str) -> list[Tensor]:
        """The weights that read a group."""
        names = {m.entity for m in self._groups[name].members if m.role == "in"}
        return [weight for entity, weight in self._weights.items() if entity in names]

    def of(self, name: str) -> list[tuple[ReaderOfUnits, Quadratic]]:
        """The matrices with columns of a group; a weight that only selects outputs has none."""
        group = self._groups[name]
        pairs = []
        for member in (m for m in group.members if m.role == "in" and m.entity in self._weights):
            weight = self._weights[member.entity]
            positions = torch.full((weight.shape[member.axis],), -1, dtype=torch.long, device="cpu")
            positions[torch.from_numpy(member.index)] = torch.from_numpy(member.unit)
            shape = [1] * weight.dim()
            shape[member.axis] = -1
            units = positions.view(shape).expand(weight.shape).contiguous()
            for reader in self._found.values():
                if reader.name == member.entity and reader.covariance.tokens:
                    quadratic = reader.quadratic(units)
                    _check_finite(reader.name, quadratic.gram)
                    if bool((quadratic.units >= 0).any()):
                        pairs.append((reader, quadratic))
        return pairs


def _check_finite(name: str, gram: Gram) -> None:
    """Errors: BadInput if a layer has read NaN, infinity, or values with squares that overflow."""
    if not bool(gram.isfinite().all()):
        why = "NaN, infinity or values too large to be squared came out of the layers before it"
        raise BadInput(f"the inputs of {name} are not finite", why, "check data= and the weights of the model")


MOST = 1 << 28
"""Bytes of the Gram matrices of one pass, if that is more than a quarter of the weights and than one group needs."""


class UnitLoss:
    """`unit_loss`: the relative loss at which a unit is eliminated, by `eliminate`, for each group with readers.

    The Gram matrices of all groups together may be larger than the model. Each pass over the data then gathers those of
    some groups, so that memory does not grow with the number of layers.
    """

    def __init__(self, subject: Subject, *, ridge: float = 1e-3) -> None:
        groups = [group for group in subject.groups if not group.paths]
        self._parameters, self._ridge = subject.parameters, ridge
        self._portions = _portions(groups, subject.parameters)
        self._losses: dict[str, Tensor] = {}
        self._real: Tensor | None = None
        self._readers = Readers(self._parameters, self._portions[0])

    def once(self) -> None:
        """Called if the data can be read only once: all groups take one pass."""
        self._portions = [[group for portion in self._portions for group in portion]]
        self._readers = Readers(self._parameters, self._portions[0])

    def begin(self, batch: Any) -> None:
        """Receives the batch before its pass; padding by its `attention_mask` is ignored."""
        self._real = real_tokens(batch)

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return self._readers.watch(self._real)

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def again(self) -> bool:
        """Called after each pass over the data: whether another one is needed, for the next groups."""
        for group in self._portions.pop(0):
            quadratics = [quadratic for _, quadratic in self._readers.of(group.name)]
            if quadratics:
                self._losses[group.name] = eliminate(quadratics, group.size, ridge=self._ridge).losses
        self._readers = Readers(self._parameters, self._portions[0] if self._portions else ())
        return bool(self._portions)

    def result(self) -> dict[str, Tensor]:
        """By name of the group; the weights of one group at a time are in float64."""
        return self._losses


def _portions(groups: Sequence[Group], parameters: Mapping[str, Tensor]) -> list[list[Group]]:
    """Groups in order, as many together as `MOST` allows, at least one."""
    most = max(MOST, sum(p.numel() * p.element_size() for p in parameters.values()) // 4)
    portions, size = [list[Group]()], 0
    for group in groups:
        own = sum(_gram_bytes(parameters.get(m.entity), m.axis) for m in group.members if m.role == "in")
        if portions[-1] and size + own > most:
            portions, size = [*portions, []], 0
        portions[-1].append(group)
        size += own
    return portions


def _gram_bytes(weight: Tensor | None, axis: int) -> int:
    """Of the Gram matrix of the inputs of a weight that has them on this axis and, in a convolution, behind it."""
    if weight is None or weight.dim() < 2:
        return 0
    return 8 * (weight.numel() // weight.shape[1 if axis == 0 else 0]) ** 2
