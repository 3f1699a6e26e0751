"""Outputs of a call that returns more than the example does, such as features or the states of every block.

They may show the cut itself: a feature has the kept positions alone, and a list with one entry for each block has none
for a dropped block. So much is no fault; any other difference is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from torch import Tensor

from prunella.graph.cut.changes import Changes

Same = Callable[[Tensor, Tensor], bool]
_MOST_SETS = 64
"""Most combinations of kept positions that are tried for one output."""


def as_cut(reference: list[Tensor], outputs: Sequence[Tensor], done: Changes, same: Same) -> list[Tensor]:
    """The reference without removed positions and without entries of dropped blocks, where `outputs` lack them."""
    if done.dropped and len(outputs) < len(reference):
        reference = _without_dropped(reference, outputs, done, same)
    if len(outputs) != len(reference):
        return reference
    return [_at_kept(a, b, done, same) for a, b in zip(reference, outputs, strict=True)]


def contains(more: Sequence[Tensor], few: Sequence[Tensor], same: Same) -> bool:
    """Whether `more` has all of `few`, in their order."""
    left = iter(more)
    return all(any(same(tensor, entry) for entry in left) for tensor in few)


def _without_dropped(reference: list[Tensor], outputs: Sequence[Tensor], done: Changes, same: Same) -> list[Tensor]:
    left, kept = iter(reference), list[Tensor]()
    for output in outputs:
        match = next((entry for entry in left if same(_at_kept(entry, output, done, same), output)), None)
        if match is None:
            return reference
        kept.append(match)
    return kept


def _at_kept(dense: Tensor, small: Tensor, done: Changes, same: Same) -> Tensor:
    """The positions of an output that the smaller one has: those that a cut of as many positions keeps."""
    if dense.dim() != small.dim() or dense.shape == small.shape:
        return dense
    axes = [axis for axis in range(dense.dim()) if dense.shape[axis] != small.shape[axis]]
    cuts = [_sets_kept(done, dense.shape[axis], small.shape[axis]) for axis in axes]
    for number, chosen in enumerate(product(*cuts)):
        if number >= _MOST_SETS:
            break
        part = dense
        for axis, kept in zip(axes, chosen, strict=True):
            part = part.index_select(axis, kept.to(dense.device))
        if same(part, small):
            return part
    return dense


def _sets_kept(done: Changes, before: int, after: int) -> list[Tensor]:
    """The different sets of so many positions that a cut keeps of an axis of that size, also of heads as a whole."""
    kept_sets = [kept for axes in done.cuts.values() for kept in axes.values()]
    sets = {tuple(kept.tolist()): kept for kept in kept_sets if len(kept) == after and int(kept.max()) < before}
    return list(sets.values())
