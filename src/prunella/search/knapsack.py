"""The multiple-choice knapsack: one option for each group under a budget, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts are imported where they are used first: a quarter of a second

from prunella.errors import RequestError, TargetMissed
from prunella.registry.method import search
from prunella.search.scan import Scan
from prunella.search.space import Predict, SearchResult, Space
from prunella.selection import Counts
from prunella.targets import Target

ROUNDS = 30
_Floats = np.ndarray[Any, np.dtype[Any]]


class Option(NamedTuple):
    """The cost and the loss of one option of a group."""

    cost: float
    loss: float


def cheapest(options: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...]:
    """For each group the option to take: the smallest sum of losses whose costs are at most `budget`.

    `min sum_go loss_go x_go  s.t.  sum_go cost_go x_go <= budget, sum_o x_go = 1, x binary`, solved by branch and bound
    (HiGHS through `scipy.optimize.milp`). The sum of costs is recounted exactly: a choice that is above the budget by
    less than the solver's tolerance is excluded, and the problem is solved again. The loss is the smallest to 1e-10 of
    the largest loss. Among equal losses the cheaper choice is taken.

    Errors: TargetMissed if even the cheapest options exceed the budget.

    Example:

        >>> import prunella as pr
        >>> first = [pr.search.Option(cost=4, loss=0), pr.search.Option(cost=1, loss=2)]
        >>> second = [pr.search.Option(cost=4, loss=0), pr.search.Option(cost=2, loss=1)]
        >>> pr.search.cheapest([first, second], 6)
        (0, 1)
    """
    if not options or not all(options):
        raise RequestError("every group needs at least one option", f"got {[len(o) for o in options]}")
    least = sum(min(option.cost for option in choices) for choices in options)
    limit = budget + 1e-9 * max(1.0, abs(budget))
    if least > limit:
        why = f"the cheapest option of every group costs {least:.6g} together"
        raise TargetMissed(f"a budget of {budget:.6g} cannot be met", why, "allow more, or give smaller options")
    program = _Program(options, limit)
    first, said = program.best(program.losses)
    if first is None:
        raise TargetMissed("the solver found no choice within the budget", said, "allow more")
    ceiling = scipy.optimize.LinearConstraint(program.losses, -np.inf, program.losses[list(first)].sum())
    second, _ = program.best(program.costs, ceiling)  # the cheaper one of equal loss
    # With both limits reached exactly, rounding may leave the solver none: then the first one is the answer.
    return tuple(program.options[place] for place in min((first, second or first), key=program.value))


class _Program:
    """The binary program: one variable for each option that fits with the cheapest options of all other groups.

    Costs and losses are counted from the smallest of their group, and scaled to 1 and 10 000: the solver's absolute
    tolerance of 1e-6 is then 1e-10 of the largest loss.
    """

    def __init__(self, options: Sequence[Sequence[Option]], limit: float) -> None:
        least = [min(option.cost for option in choices) for choices in options]
        room = limit - sum(least)
        fitting = [
            (group, place, option)
            for group, choices in enumerate(options)
            for place, option in enumerate(choices)
            if option.cost - least[group] <= room
        ]
        self.groups = np.array([group for group, _, _ in fitting])
        self.options = [place for _, place, _ in fitting]
        self.exact = [option for _, _, option in fitting]
        self.limit = limit
        extra = np.array([option.cost - least[group] for group, _, option in fitting])
        self.costs = extra / (room or 1.0)
        self.losses = _scaled(np.array([option.loss for _, _, option in fitting]), self.groups)
        one_of_each = scipy.sparse.csr_array((np.ones(len(fitting)), (self.groups, np.arange(len(fitting)))))
        self.constraints = [
            scipy.optimize.LinearConstraint(one_of_each, 1, 1),
            scipy.optimize.LinearConstraint(self.costs, -np.inf, 1.0),
        ]

    def best(
        self, objective: _Floats, *constraints: scipy.optimize.LinearConstraint
    ) -> tuple[tuple[int, ...] | None, str]:
        """Variables of the exact choice that fits with the smallest sum of `objective`; None, and why, without one.

        Without presolve: that drops choices which meet the budget to less than its tolerance.
        """
        while True:
            solution = scipy.optimize.milp(
                objective, integrality=np.ones(len(objective)), bounds=scipy.optimize.Bounds(0, 1),
                constraints=[*self.constraints, *constraints], options={"mip_rel_gap": 0.0, "presolve": False},
            )  # fmt: skip
            if solution.x is None:
                return None, str(solution.message)
            chosen = tuple(np.flatnonzero(solution.x > 0.5).tolist())
            if sum(self.exact[variable].cost for variable in chosen) <= self.limit:
                return chosen, ""
            self.constraints.append(scipy.optimize.LinearConstraint(solution.x > 0.5, -np.inf, len(chosen) - 1))

    def value(self, chosen: tuple[int, ...]) -> tuple[float, float]:
        """Loss and cost, exactly."""
        parts = [self.exact[variable] for variable in chosen]
        return sum(part.loss for part in parts), sum(part.cost for part in parts)


def _scaled(losses: _Floats, groups: _Floats) -> _Floats:
    """Losses above the smallest of their group, the largest 10 000; one that is not finite weighs more than all."""
    finite = np.isfinite(losses)
    top = float(np.abs(losses[finite]).max(initial=1.0))
    losses = np.where(finite, losses, 2 * top * (groups.max() + 2))
    above = losses - np.array([losses[groups == group].min() for group in range(groups.max() + 1)])[groups]
    scaled: _Floats = above * (1e4 / (above.max() or 1.0))
    return scaled


@search(source="Frantar & Alistarh 2022, arXiv:2201.13096; Shen et al. 2021, arXiv:2110.10811")
def knapsack(space: Space, target: Target, scan: Scan, *, predict: Predict | None = None) -> SearchResult:
    """Choose one point of a sensitivity scan for each group: the smallest sum of losses within the budget.

    `min sum_l drop_l(o_l)  s.t.  cost(o_1 ... o_L) <= budget`. A group has an option for each point of its curve, and
    one that keeps it dense. Losses are assumed to add up. Costs do not add up: the multiply-adds of a layer are the
    product of both its widths. The cost of an option is computed with all other groups dense. Each solution is then
    recounted exactly, the budget is corrected by the error, and the problem is solved again until the exact cost fits.
    Among the solutions that fit, the one with the smallest sum of losses is taken. `plan` with
    `allocation=result.allocation` meets the target to the unit.

    target: any. predict: a function of counts to milliseconds for a `Latency`, such as a `latency_table`, to avoid
    timing every choice; or any other cost, such as peak memory. `value` of the result is minus the sum of losses.

    Use: measured options per group, one budget. Avoid: losses that depend on each other strongly: take `evolve`.
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
        [Option(costs((*nothing[:i], removed, *nothing[i + 1 :])) - dense, drop) for removed, drop in choices]
        for i, choices in enumerate(levels)
    ]
    best, room, tried = None, budget - dense, 0
    for _ in range(ROUNDS):
        try:
            indices = cheapest(options, room)
        except TargetMissed:
            break
        tried += 1
        counts = tuple(choices[index][0] for choices, index in zip(levels, indices, strict=True))
        loss = sum(choices[index][1] for choices, index in zip(levels, indices, strict=True))
        over = costs(counts) - budget
        if over <= 1e-9 * abs(budget) and (best is None or loss < best[0]):
            best = (loss, counts)
        if abs(over) <= 1e-9 * abs(budget) or (over < 0 and _known(room - over, options, indices)):
            break
        room -= over
    if best is None:
        best = _deepest(levels, costs, budget, target)
    return SearchResult(space.shares(best[1]), -best[0], costs(best[1]), tried)


def _known(room: float, options: Sequence[Sequence[Option]], indices: tuple[int, ...]) -> bool:
    """Whether the larger budget gives the same choice again."""
    return cheapest(options, room) == indices


def _deepest(
    levels: Sequence[Sequence[tuple[int, float]]], costs: Predict, budget: float, target: Target
) -> tuple[float, Counts]:
    """All groups at their last option, if this meets the budget."""
    counts = tuple(max(removed for removed, _ in choices) for choices in levels)
    if (reach := costs(counts)) > budget:
        why = f"all groups at their last option leave {reach:.6g}, the budget is {budget:.6g}"
        raise TargetMissed(f"{target} cannot be met by these options", why, "scan with higher ratios")
    return sum(
        next(drop for removed, drop in choices if removed == c) for choices, c in zip(levels, counts, strict=True)
    ), counts


def _costing(space: Space, target: Target, predict: Predict | None) -> Predict:
    return predict or (lambda counts: space.cost(target, counts))
