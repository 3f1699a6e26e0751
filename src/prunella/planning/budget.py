"""From scores to counts: the competing pools, the steps in which each may shrink, and the counts that meet a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.allocation.pool import Allocation, Pool
from prunella.errors import RequestError
from prunella.selection import Counts, shortest_prefix


@dataclass(frozen=True)
class Ladder:
    """The steps in which one pool may shrink: `keys` in float64, `first` units in the first step, then `stride`."""

    keys: Tensor
    first: int
    stride: int

    def removed(self, steps: int) -> int:
        """Units removed after this many steps."""
        return self.first + (steps - 1) * self.stride if steps else 0


def ladder(keys: Tensor, min_density: float, round_to: int, min_units: int = 1) -> Ladder:
    """Cut the keys of one pool at its minimum and into blocks, so that every width is a multiple of `round_to`.

    `max(min_units, ceil(min_density * n))` units are kept, rounded up to a multiple of `round_to`; a pool narrower
    than `round_to` is kept dense. The key of a block is the mean of its units' keys, so that blocks round to the
    nearest width.
    """
    size = len(keys)
    kept = min(size, round_to * math.ceil(max(min_units, math.ceil(min_density * size - 1e-9)) / round_to))
    first = size % round_to or round_to
    if round_to == 1:
        return Ladder(keys[: size - kept], 1, 1)
    steps = max(0, (size - kept - first) // round_to + 1)
    if not steps:
        return Ladder(keys[:0], first, round_to)
    edges = range(first, first + steps * round_to, round_to)
    means = torch.stack([keys[max(0, end - round_to) : end].mean() for end in edges])
    return Ladder(means.cummax(0).values, first, round_to)


def allocate(pools: Sequence[Pool], allocation: Allocation) -> list[Tensor]:
    """The keys of every pool, checked against the contract of `Allocation`."""
    keys = allocation(pools)
    for pool, key in zip(pools, keys, strict=True):
        if key.shape != pool.scores.shape or not bool(torch.isfinite(key).all()) or bool((key.diff() < 0).any()):
            raise RequestError(
                f"the allocation gave keys for {pool.name} that are no order of removal",
                f"{pool.size} finite numbers that do not decrease are needed",
            )
    return [key.double() for key in keys]


def solve(ladders: Sequence[Ladder], met: Callable[[Counts], bool], *, equal_widths: bool = False) -> Counts | None:
    """Units to remove from every pool: the fewest that meet the target; None if removing all of them does not.

    equal_widths: a key that is removed in one pool is removed in all pools that have it.
    """

    def reached(steps: Counts) -> bool:
        return met(removed(ladders, steps))

    steps = shortest_prefix([entry.keys for entry in ladders], reached)
    if steps is None:
        return None
    return removed(ladders, _equalized(ladders, steps) if equal_widths else steps)


def _equalized(ladders: Sequence[Ladder], steps: Counts) -> Counts:
    """The steps, and all others whose key is no larger than the largest among them."""
    last = max(
        (float(entry.keys[count - 1]) for entry, count in zip(ladders, steps, strict=True) if count), default=None
    )
    if last is None:
        return steps
    return tuple(int((entry.keys <= last).sum()) for entry in ladders)


def removed(ladders: Sequence[Ladder], steps: Counts) -> Counts:
    """Units removed from every pool after this many steps on its ladder."""
    return tuple(entry.removed(count) for entry, count in zip(ladders, steps, strict=True))


def most(ladders: Sequence[Ladder]) -> Counts:
    """Units removed when every pool is at its minimum."""
    return removed(ladders, tuple(len(entry.keys) for entry in ladders))
