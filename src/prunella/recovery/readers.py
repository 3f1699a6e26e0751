"""The layers that read a pruned axis, in the dense model and in the small one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.graph.cut.block_surgery import renamed
from prunella.model.forward import forward
from prunella.model.masks import masks_of
from prunella.model.watch import Read, Unread, Watch
from prunella.planning.plan import Plan
from prunella.types import Loss, Mask

Axes = Mapping[int, Tensor]
"""Axis of a weight -> the positions that are kept."""


@dataclass(frozen=True)
class Piece:
    """One matrix of a weight: its number in the dense and in the small model, and what of it takes part.

    columns, rows: of the small matrix (None: all). expected: the rows of the dense matrix that they stand for (None:
    all). kept: which columns of the dense matrix are left.
    """

    dense: int
    small: int
    columns: Tensor | None
    rows: Tensor | None
    expected: Tensor | None
    kept: Mask


@dataclass(frozen=True)
class Part:
    """A part of a weight that is read in one way, in both models, without the values of a run; and its matrices."""

    dense: Read
    small: Read
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Reader:
    """A weight that reads a pruned axis. order: of each call in a forward pass, the part that it reads."""

    name: str
    dense: nn.Parameter
    small: nn.Parameter
    parts: tuple[Part, ...]
    order: tuple[int, ...]

    @property
    def biased(self) -> bool:
        """Whether every part adds a bias."""
        return all(part.small.bias is not None for part in self.parts)


@dataclass(frozen=True)
class Skipped:
    """A weight that reads a pruned axis and is left as it is, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    """A weight that may be a reader, before the small model has run: the axes of both models that take part."""

    name: str
    dense: nn.Parameter
    small: nn.Parameter
    axes: Axes
    left: Axes


def readers_of(small: nn.Module, dense: nn.Module, batch: Any, plan: Plan, loss: Loss | None) -> list[Reader | Skipped]:
    """Every weight that reads a cut axis in the order of execution. Both models run on the batch once."""
    named = dict(dense.named_parameters(remove_duplicate=False))
    cut = {named[name]: (name, axes) for name, axes in plan.cuts.items() if name in named and named[name].dim() > 1}
    seen, others = _run(dense, list(cut), batch, loss)
    new = renamed(dense, plan.dropped)
    found: list[_Candidate | Skipped] = []
    for weight, reads in seen.items():
        name, axes = cut[weight]
        if name in new and any(_reads_along(read, axis) for axis in axes for read in reads):
            reason = _unfit(reads, others.get(id(weight)))
            found.append(Skipped(name, reason) if reason else _candidate(small, weight, name, axes, new))
    for weight, (name, _) in cut.items():
        other = others.get(id(weight))
        if weight not in seen and name in new and other is not None and not other.operation.startswith("embedding"):
            found.append(Skipped(name, str(other)))
    wanted = [item.small for item in found if isinstance(item, _Candidate)]
    now = _run(small, wanted, batch, loss)[0] if wanted else {}
    return [i if isinstance(i, Skipped) else _reader(i, seen[i.dense], now.get(i.small, [])) for i in found]


def _run(
    model: nn.Module, weights: Sequence[nn.Parameter], batch: Any, loss: Loss | None
) -> tuple[dict[nn.Parameter, list[Read]], dict[int, Unread]]:
    """The reads of one pass, without their values, by weight."""
    seen: dict[nn.Parameter, list[Read]] = {}
    watch = Watch(weights, lambda read: seen.setdefault(read.weight, []).append(read.bare))
    with watch:
        loss(model, batch) if loss else forward(model, batch)
    watch.finish()
    return seen, watch.others


def _reads_along(read: Read, axis: int) -> bool:
    """Whether positions of an axis of the weight are columns of its matrices."""
    first = torch.zeros(read.weight.shape, dtype=torch.bool)
    first.select(axis, 0).fill_(True)
    matrices = read.matrices(first)
    return bool((matrices.any(2) != matrices.all(2)).any())


def _unfit(reads: Sequence[Read], other: Unread | None) -> str:
    if other is not None:
        return other.tied
    return "it is used in two different ways" if _overlap(_kinds(reads)) else ""


def _kind(read: Read) -> tuple[object, ...]:
    """Equal for two reads of the same matrices with the same bias, turned or not."""
    bias = None if read.bias is None else read.bias.data_ptr()
    matrices = read.matrices()
    if matrices.data_ptr() == read.view.of(read.weight).data_ptr():  # a view
        return matrices.shape, matrices.stride(), read.view.offset, bias
    return read.view, read.form.orientation, bias


def _kinds(reads: Sequence[Read]) -> list[Read]:
    """One read of each part of a weight, way of reading it, and bias."""
    return list({_kind(read): read for read in reversed(reads)}.values())[::-1]


def _overlap(reads: Sequence[Read]) -> bool:
    """Whether some weights are in several of these parts."""
    if len(reads) == 1:
        return False
    weight = reads[0].weight
    count = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.int8).zero_()
    for read in reads:
        read.view.of(count).add_(1)
    return bool((count > 1).any())


def _candidate(
    small: nn.Module, dense: nn.Parameter, name: str, axes: Axes, new: Mapping[str, str]
) -> _Candidate | Skipped:
    """A weight by its name in the dense model; `new` has its name in the small one."""
    named = dict(small.named_parameters(remove_duplicate=False))
    if new[name] not in named:
        raise RequestError(
            f"the small model has no parameter {name!r}", "it was made from another model", "pass plan's own model"
        )
    weight = named[new[name]]
    places = {axis: _positions(name, axis, dense, weight, axes.get(axis)) for axis in range(dense.dim())}
    left = {axis: kept for axis, kept in places.items() if kept is not None}
    mask = masks_of(small).get(new[name])
    if mask is not None and not bool(_select(mask, left).all()):
        return Skipped(name, "single weights of it are masked, and a refit would fill them")
    return _Candidate(name, dense, weight, axes, left)


def _positions(name: str, axis: int, dense: Tensor, small: Tensor, kept: Tensor | None) -> Tensor | None:
    """Positions of the small weight that take part: all if the axis was cut physically, the kept ones if masked."""
    full, size = dense.shape[axis], small.shape[axis]
    left = full if kept is None else kept.numel()
    if size not in (full, left):
        raise RequestError(
            f"axis {axis} of {name} has {size} positions in the small model, {full} in the dense one",
            f"the plan keeps {left}",
            "pass the plan that the small model was made with",
        )
    return kept if size != left else None


def _select(tensor: Tensor, positions: Axes) -> Tensor:
    for axis, kept in positions.items():
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor


def _reader(item: _Candidate, dense: Sequence[Read], small: Sequence[Read]) -> Reader:
    if len(dense) != len(small):
        raise CheckFailed("the small model did not run every layer that the dense one ran", "", "")
    keys = [_kind(read) for read in _kinds(dense)]
    order = tuple(keys.index(_kind(read)) for read in dense)
    masks = _mask(item.dense, item.axes), _mask(item.small, item.left)
    parts = []
    for number in range(len(keys)):
        at = order.index(number)
        parts.append(Part(dense[at], small[at], _pieces(item.name, dense[at], small[at], masks)))
    return Reader(item.name, item.dense, item.small, tuple(parts), order)


def _mask(weight: Tensor, axes: Axes) -> Mask:
    """Which weights are left."""
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for axis, kept in axes.items():
        gone = torch.ones(weight.shape[axis], dtype=torch.bool)
        gone[kept.cpu()] = False
        mask.movedim(axis, 0)[gone] = False
    return mask


def _pieces(name: str, dense: Read, small: Read, masks: tuple[Mask, Mask]) -> tuple[Piece, ...]:
    """The matrices of which something is left, those of the dense model beside those of the small one."""
    old, now = (
        [(k, m.any(1), m.any(0)) for k, m in enumerate(read.matrices(mask)) if bool(m.any())]
        for read, mask in zip((dense, small), masks, strict=True)
    )
    if [(int(a.sum()), int(b.sum())) for _, a, b in old] != [(int(a.sum()), int(b.sum())) for _, a, b in now]:
        raise CheckFailed(f"{name} is read as other matrices in the small model than in the dense one", "", "")
    return tuple(
        Piece(k, j, _some(columns), _some(rows), _some(wanted), kept)
        for (k, wanted, kept), (j, rows, columns) in zip(old, now, strict=True)
    )


def _some(mask: Mask) -> Tensor | None:
    """The positions that are True, None if all are."""
    return None if bool(mask.all()) else mask.nonzero()[:, 0]
