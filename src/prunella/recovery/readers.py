"""The layers that read a pruned axis, in the dense model and in the small one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.graph.cut.block_surgery import renamed
from prunella.model.forward import run
from prunella.model.masks import masks_of
from prunella.model.observed_reads import Read, Unread
from prunella.model.state import losses_in_training_
from prunella.model.watch import Watch
from prunella.planning.plan import Plan
from prunella.types import Loss, Mask

Axes = Mapping[int, Tensor]
"""Axis of a weight -> the positions that are kept."""


@dataclass(frozen=True)
class Submatrix:
    """One matrix of a weight: its number in the dense and in the small model, and its kept rows and columns.

    columns, rows: kept positions of the small matrix (None: all). expected: the corresponding rows of the dense matrix
    (None: all). kept: mask of the kept columns of the dense matrix.
    """

    dense: int
    small: int
    columns: Tensor | None
    rows: Tensor | None
    expected: Tensor | None
    kept: Mask


@dataclass(frozen=True)
class Part:
    """A part of a weight with its matrices, and the read of each model, without activations."""

    dense: Read
    small: Read
    submatrices: tuple[Submatrix, ...]

    @property
    def shifts(self) -> bool:
        """Whether a constant can be added to the outputs: by a bias, or by the mean of the following norm."""
        return self.small.bias is not None or (self.small.norm is not None and self.dense.norm is not None)


@dataclass(frozen=True)
class Reader:
    """A weight that reads a pruned axis. order: for each call in a forward pass, the part that the call reads."""

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
    """A weight that reads a pruned axis but is not refitted, with the reason."""

    name: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    """A weight that may be a reader, before the small model has run. axes, left: kept positions in both models."""

    name: str
    dense: nn.Parameter
    small: nn.Parameter
    axes: Axes
    left: Axes


def readers_of(small: nn.Module, dense: nn.Module, batch: Any, plan: Plan, loss: Loss | None) -> list[Reader | Skipped]:
    """Every weight that reads a pruned axis, in the order of execution. Both models run on the batch once."""
    named = dict(dense.named_parameters(remove_duplicate=False))
    cut = {named[name]: (name, axes) for name, axes in plan.cuts.items() if name in named and named[name].dim() > 1}
    seen, others = _run(dense, list(cut), batch, loss)
    new_names = renamed(dense, plan.dropped)
    entries: list[_Candidate | Skipped] = []
    for weight, reads in seen.items():
        name, axes = cut[weight]
        if name in new_names and any(_reads_along(read, axis) for axis in axes for read in reads):
            reason = _unfit(reads, others.get(id(weight)))
            entries.append(Skipped(name, reason) if reason else _candidate(small, weight, name, axes, new_names))
    for weight, (name, _) in cut.items():
        other = others.get(id(weight))
        if (
            weight not in seen
            and name in new_names
            and other is not None
            and not other.operation.startswith("embedding")
        ):
            entries.append(Skipped(name, str(other)))
    weights = [item.small for item in entries if isinstance(item, _Candidate)]
    small_reads = _run(small, weights, batch, loss)[0] if weights else {}
    return [i if isinstance(i, Skipped) else _reader(i, seen[i.dense], small_reads.get(i.small, [])) for i in entries]


def _run(
    model: nn.Module, weights: Sequence[nn.Parameter], batch: Any, loss: Loss | None
) -> tuple[dict[nn.Parameter, list[Read]], dict[int, Unread]]:
    """For each weight the reads of one pass, without activations."""
    seen: dict[nn.Parameter, list[Read]] = {}
    try:
        watch = _watched(model, weights, batch, loss, seen)
    except Exception:  # whatever a user's loss raises
        if not losses_in_training_(model, batch, loss):
            raise
        seen.clear()
        watch = _watched(model, weights, batch, loss, seen)
    return seen, watch.others


def _watched(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    batch: Any,
    loss: Loss | None,
    seen: dict[nn.Parameter, list[Read]],
) -> Watch:
    watch = Watch(weights, lambda read: seen.setdefault(read.weight, []).append(read.bare))
    with watch:
        run(model, batch, loss)
    watch.finish()
    for weight, reads in seen.items():
        if id(weight) in watch.reused:  # the output has other readers than the norm
            seen[weight] = [replace(read, norm=None) for read in reads]
    return watch


def _reads_along(read: Read, axis: int) -> bool:
    """Whether the positions of this axis of the weight are columns of its matrices."""
    first = torch.zeros(read.weight.shape, dtype=torch.bool, device="cpu")
    first.select(axis, 0).fill_(True)
    matrices = read.matrices(first)
    return bool((matrices.any(2) != matrices.all(2)).any())


def _unfit(reads: Sequence[Read], other: Unread | None) -> str:
    if other is not None:
        return other.tied
    return "it is used in two different ways" if _overlap(_kinds(reads)) else ""


def _kind(read: Read) -> tuple[object, ...]:
    """A key that is equal for two reads of the same matrices with the same bias, transposed or not."""
    bias = None if read.bias is None else read.bias.data_ptr()
    matrices = read.matrices()
    if matrices.data_ptr() == read.view.of(read.weight).data_ptr():  # a view
        return matrices.shape, matrices.stride(), read.view.offset, bias
    return read.view, read.form.orientation, bias


def _kinds(reads: Sequence[Read]) -> list[Read]:
    """One read for each key of `_kind`."""
    return list({_kind(read): read for read in reversed(reads)}.values())[::-1]


def _overlap(reads: Sequence[Read]) -> bool:
    """Whether some weights are read by several of these reads."""
    if len(reads) == 1:
        return False
    weight = reads[0].weight
    count = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.int8, device="cpu").zero_()
    for read in reads:
        read.view.of(count).add_(1)
    return bool((count > 1).any())


def _candidate(
    small: nn.Module, dense: nn.Parameter, name: str, axes: Axes, new_names: Mapping[str, str]
) -> _Candidate | Skipped:
    """The candidate of this name in the dense model. new: its name in the small model."""
    named = dict(small.named_parameters(remove_duplicate=False))
    if new_names[name] not in named:
        raise RequestError(
            f"the small model has no parameter {name!r}", "it was made from another model", "pass the model of the plan"
        )
    weight = named[new_names[name]]
    positions = {axis: _positions(name, axis, dense, weight, axes.get(axis)) for axis in range(dense.dim())}
    left = {axis: kept for axis, kept in positions.items() if kept is not None}
    mask = masks_of(small).get(new_names[name])
    if mask is not None and not bool(_select(mask, left).all()):
        return Skipped(name, "it has masks of single weights, and a refit would fill them")
    return _Candidate(name, dense, weight, axes, left)


def _positions(name: str, axis: int, dense: Tensor, small: Tensor, kept: Tensor | None) -> Tensor | None:
    """Kept positions of the small weight: None (all) if the axis was cut physically, the plan's if it is masked."""
    full, size = dense.shape[axis], small.shape[axis]
    left = full if kept is None else kept.numel()
    if size not in (full, left):
        raise RequestError(
            f"axis {axis} of {name} has {size} positions in the small model, {full} in the dense one",
            f"the plan keeps {left}",
            "pass the plan of the small model",
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
        parts.append(Part(dense[at], small[at], _submatrices(item.name, dense[at], small[at], masks)))
    return Reader(item.name, item.dense, item.small, tuple(parts), order)


def _mask(weight: Tensor, axes: Axes) -> Mask:
    """True at the kept weights."""
    mask = torch.ones(weight.shape, dtype=torch.bool, device="cpu")
    for axis, kept in axes.items():
        removed = torch.ones(weight.shape[axis], dtype=torch.bool, device="cpu")
        removed[kept.cpu()] = False
        mask.movedim(axis, 0)[removed] = False
    return mask


def _submatrices(name: str, dense: Read, small: Read, masks: tuple[Mask, Mask]) -> tuple[Submatrix, ...]:
    """The matrices with kept weights: each of the dense model with its counterpart in the small one."""
    dense_parts, small_parts = (
        [(k, m.any(1), m.any(0)) for k, m in enumerate(read.matrices(mask)) if bool(m.any())]
        for read, mask in zip((dense, small), masks, strict=True)
    )
    if [(int(a.sum()), int(b.sum())) for _, a, b in dense_parts] != [
        (int(a.sum()), int(b.sum())) for _, a, b in small_parts
    ]:
        raise CheckFailed(f"{name} is read as different matrices in the small model and in the dense one", "", "")
    return tuple(
        Submatrix(k, j, _positions_of(columns), _positions_of(rows), _positions_of(expected), kept)
        for (k, expected, kept), (j, rows, columns) in zip(dense_parts, small_parts, strict=True)
    )


def _positions_of(mask: Mask) -> Tensor | None:
    """The positions that are True, or None if all are."""
    return None if bool(mask.all()) else mask.nonzero()[:, 0]
