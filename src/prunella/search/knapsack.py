"""One option for each group under a budget: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from prunella.errors import RequestError, TargetMissed
from prunella.registry.method import search
from prunella.search.scan import Scan
from prunella.search.space import Found, Predict, Space
from prunella.selection import Counts
from prunella.targets import Target

ROUNDS = 30


class Option(NamedTuple):
    """What one choice for one group costs, and what it loses."""

    cost: float
    loss: float


@dataclass(frozen=True)
class _Part:
    """A choice for the first groups that no other beats in both numbers."""

    cost: float
    loss: float
    last: int
    before: _Part | None


def cheapest(options: Sequence[Sequence[Option]], budget: float, *, most: int = 20000) -> tuple[int, ...]:
    """For each group the option to take: the smallest sum of losses whose costs are at most `budget`.

    Dynamic programming over the groups that keeps every choice no other beats in both cost and loss, and that can still
    be completed within the budget: exact for any real numbers, without buckets. Among equal losses the cheaper.

    most: choices kept after a group. Where there are more, the best of each of `most` ranges of cost is kept: the
    budget still holds, and the loss is then near the smallest.

    Errors: TargetMissed when even the cheapest options are beyond the budget.
    """
    if not options or not all(options):
        raise RequestError("every group needs at least one option", f"got {[len(o) for o in options]}")
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
        if not fitting:
            why = f"the cheapest option of every group costs {sum(least):.6g} together"
            raise TargetMissed(f"a budget of {budget:.6g} cannot be met", why, "allow more, or give smaller options")
        front = list(_thinned(_unbeaten(fitting), most))
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


def _thinned(parts: list[_Part], most: int) -> list[_Part]:
    if len(parts) <= most:
        return parts
    low, width = parts[0].cost, (parts[-1].cost - parts[0].cost) / most or 1.0
    best = {int((part.cost - low) / width): part for part in parts}  # the last of a range has the smallest loss
    return list(dict.fromkeys([parts[0], *best.values()]))


@search(source="Frantar & Alistarh 2022, arXiv:2203.04593; Shen et al. 2021, arXiv:2110.10811")
def knapsack(space: Space, target: Target, scan: Scan, *, predict: Predict | None = None) -> Found:
    """The points of a sensitivity scan as options: the choice with the smallest sum of losses within the budget.

    `min sum_l drop_l(o_l)  s.t.  cost(o_1 ... o_L) <= budget`, an option of a group for each point of its curve and one
    for leaving it whole. Losses are taken as if they added up. Costs do not: a layer's multiply-adds are the product of
    both of its widths. An option is weighed with all other groups whole; every solution is then recounted exactly, the
    budget is moved by the error and solved again, until the exact cost fits; the cheapest exact one that fits with the
    smallest sum of losses is taken. `plan` with `allocation=found.allocation` meets the target to the unit.

    target: any. predict: milliseconds of counts for a `Latency` from a table (`latency_table`), where not every choice
    shall be timed; or any other cost, such as peak memory. `value` of the result is minus the sum of losses.

    Use: per-group options that were measured, one budget. Avoid: losses that depend on each other much: take `evolve`.
    """
    costs = _costing(space, target, predict)
    budget = space.budget(target, predict)
    nothing: Counts = (0,) * len(space.names)
    dense = costs(nothing)
    drops = scan.drops
    levels = [
        [(0, 0.0), *((round(x * size), drop) for x, drop in drops.get(name, ()))]
        for name, size in zip(space.names, space.sizes, strict=True)
    ]
    options = [
        [Option(costs((*nothing[:i], gone, *nothing[i + 1 :])) - dense, drop) for gone, drop in choices]
        for i, choices in enumerate(levels)
    ]
    best, room, tried = None, budget - dense, 0
    for _ in range(ROUNDS):
        try:
            chosen = cheapest(options, room)
        except TargetMissed:
            break
        tried += 1
        counts = tuple(choices[index][0] for choices, index in zip(levels, chosen, strict=True))
        loss = sum(choices[index][1] for choices, index in zip(levels, chosen, strict=True))
        over = costs(counts) - budget
        if over <= 1e-9 * abs(budget) and (best is None or loss < best[0]):
            best = (loss, counts)
        if abs(over) <= 1e-9 * abs(budget) or (over < 0 and _known(room - over, options, chosen)):
            break
        room -= over
    if best is None:
        best = _deepest(levels, costs, budget, target)
    return Found(space.shares(best[1]), -best[0], costs(best[1]), tried)


def _known(room: float, options: Sequence[Sequence[Option]], chosen: tuple[int, ...]) -> bool:
    """Whether the larger room gives the same choice again."""
    return cheapest(options, room) == chosen


def _deepest(
    levels: Sequence[Sequence[tuple[int, float]]], costs: Predict, budget: float, target: Target
) -> tuple[float, Counts]:
    """Everything at its last option, if that is enough."""
    counts = tuple(max(gone for gone, _ in choices) for choices in levels)
    if (reach := costs(counts)) > budget:
        why = f"all groups at their last option leave {reach:.6g}, asked {budget:.6g}"
        raise TargetMissed(f"{target} cannot be met by these options", why, "scan with higher ratios")
    return sum(
        next(drop for gone, drop in choices if gone == c) for choices, c in zip(levels, counts, strict=True)
    ), counts


def _costing(space: Space, target: Target, predict: Predict | None) -> Predict:
    return predict or (lambda counts: space.cost(target, counts))
