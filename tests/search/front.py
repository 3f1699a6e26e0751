"""The multiple-choice knapsack by dynamic programming, as an oracle: exact for any real numbers, and slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from prunella.search import Option


@dataclass(frozen=True)
class _Part:
    """A choice for the first groups that no other beats in both numbers."""

    cost: float
    loss: float
    last: int
    before: _Part | None


def cheapest_by_front(options: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...]:
    """The smallest sum of losses within the budget; among equal losses the cheaper.

    Group by group, every choice is kept that no other beats in both cost and loss, and that can still be completed.
    """
    least = [min(option.cost for option in choices) for choices in options]
    to_come = list(accumulate(reversed(least), initial=0.0))[-2::-1]  # of the groups after each
    slack = 1e-9 * max(1.0, abs(budget))
    front: list[_Part | None] = [None]
    for choices, rest in zip(options, to_come, strict=True):
        grown = [
            _Part((part.cost if part else 0.0) + option.cost, (part.loss if part else 0.0) + option.loss, index, part)
            for part in front
            for index, option in enumerate(choices)
        ]
        fitting = [part for part in grown if part.cost + rest <= budget + slack]
        assert fitting, "the budget cannot be met"
        front = list(_unbeaten(fitting))
    end = min((part for part in front if part), key=lambda part: (part.loss, part.cost))
    chosen: list[int] = []
    part: _Part | None = end
    while part is not None:
        chosen.append(part.last)
        part = part.before
    return tuple(reversed(chosen))


def _unbeaten(parts: list[_Part]) -> list[_Part]:
    """In order of cost, each with less loss than all before it."""
    kept: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.cost, part.loss)):
        if not kept or part.loss < kept[-1].loss:
            kept.append(part)
    return kept
