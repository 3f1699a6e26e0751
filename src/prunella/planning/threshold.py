"""Pruning by a threshold on scores: no budget, every unit and weight by its own score."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.graph.data import Group
from prunella.planning.budget import Ladder
from prunella.planning.diagnostics import nothing_below
from prunella.selection import Counts, without_lowest
from prunella.targets import Threshold
from prunella.types import Mask


def units_above(
    threshold: Threshold, scored: Sequence[tuple[Group, Tensor]], widths: Sequence[Ladder]
) -> dict[str, Mask]:
    """Group -> its units with a score above the threshold, and more units if that width is not allowed.

    Errors: TargetMissed when no score is at or below the threshold.
    """
    low = [int((scores <= threshold.value).sum()) for _, scores in scored]
    if not any(low):
        raise nothing_below(threshold, {group.name: scores for group, scores in scored})
    keep = {}
    for (group, scores), count, ladder in zip(scored, low, widths, strict=True):
        allowed = [ladder.removed(step) for step in range(len(ladder.keys) + 1)]
        keep[group.name] = without_lowest(scores, max(number for number in allowed if number <= count))
    return keep


def weights_below(threshold: Threshold, pools: Sequence[Pool], ladders: Sequence[Ladder], *, first: bool) -> Counts:
    """Number of weights of every layer at or below the threshold, down to the layer's minimum.

    first: whether nothing was masked before. Errors: TargetMissed when nothing is that low at the first plan.
    """
    low = [int((pool.scores <= threshold.value).sum()) for pool in pools]
    if not any(low) and first:
        raise nothing_below(threshold, {pool.name: pool.scores for pool in pools})
    return tuple(min(count, len(ladder.keys)) for count, ladder in zip(low, ladders, strict=True))
