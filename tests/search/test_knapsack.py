"""The knapsack against brute force, and what it does about costs that do not add up."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunella as pr
from prunella.search import Option, Scan, cheapest, knapsack, space
from prunella.search.space import Space
from tests.graphs import convnet, images
from tests.search.front import cheapest_by_front

numbers = st.one_of(st.integers(0, 9).map(float), st.floats(0, 9))


def brute(options: list[list[Option]], budget: float) -> float | None:
    """The smallest loss of all 6^4 choices that fit."""
    sums = [(sum(o.cost for o in choice), sum(o.loss for o in choice)) for choice in itertools.product(*options)]
    return min((loss for cost, loss in sums if cost <= budget + 1e-9 * max(1, abs(budget))), default=None)


@settings(deadline=None)  # how long the solver takes depends on the machine
@given(
    st.lists(st.lists(st.tuples(numbers, numbers), min_size=6, max_size=6), min_size=4, max_size=4), st.floats(0, 40)
)
def test_it_equals_brute_force_on_4_groups_of_6_levels(raw: list[list[tuple[float, float]]], budget: float) -> None:
    options = [[Option(*pair) for pair in choices] for choices in raw]
    expected = brute(options, budget)
    if expected is None:
        with pytest.raises(pr.PruningError, match="cannot be met"):
            cheapest(options, budget)
        return
    chosen = cheapest(options, budget)
    assert sum(choices[i].loss for choices, i in zip(options, chosen, strict=True)) == pytest.approx(expected, abs=1e-9)
    assert sum(choices[i].cost for choices, i in zip(options, chosen, strict=True)) <= budget * (1 + 1e-9) + 1e-9


def test_a_choice_that_meets_both_limits_exactly_is_found_once() -> None:
    """The solver calls the search for a cheaper one of equal loss infeasible, by rounding."""
    free, dear = (0.0, 0.0), (0.0, 2.0)
    raw = [
        [free] * 6,
        [(0.0, 1.0)] * 4 + [(0.0, 1e-12), (1.0, 0.0)],
        [(0.0, 1.0), dear, dear, (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)],
        [dear] * 4 + [(0.0, 3.0), (6.0, 0.0)],
    ]
    options = [[Option(*pair) for pair in choices] for choices in raw]
    chosen = cheapest(options, 6.0)
    assert sum(choices[k].loss for choices, k in zip(options, chosen, strict=True)) == pytest.approx(1.0, abs=1e-9)


def test_an_infeasible_budget_is_an_error_with_the_least_cost() -> None:
    options = [[Option(3.0, 0.0), Option(1.0, 5.0)], [Option(2.0, 0.0)]]
    assert cheapest(options, 3.0) == (1, 0)
    with pytest.raises(pr.PruningError, match="cheapest option of every group costs 3 together"):
        cheapest(options, 2.9)
    with pytest.raises(pr.PruningError, match="at least one option"):
        cheapest([[]], 1.0)


@pytest.mark.parametrize("whole", [False, True])
def test_many_groups_are_solved_as_by_dynamic_programming(whole: bool) -> None:
    """With whole numbers many choices have equal loss: the cheaper one is taken."""
    for seed in range(6):
        generator = random.Random(seed)
        draw = partial(generator.randint, 0, 9) if whole else generator.random
        options = [[Option(float(draw()), float(draw())) for _ in range(6)] for _ in range(12)]
        least, most = (sum(pick(o.cost for o in choices) for choices in options) for pick in (min, max))
        budget = least + 0.3 * (most - least)
        pairs = [
            [sum(c[i][part] for c, i in zip(options, picked, strict=True)) for part in (1, 0)]
            for picked in (cheapest(options, budget), cheapest_by_front(options, budget))
        ]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-9)
        assert cheapest(options, budget) == cheapest(options, budget)


def test_an_infinite_loss_is_taken_only_where_nothing_else_fits() -> None:
    options = [[Option(0.0, math.inf), Option(1.0, 5.0)], [Option(0.0, 7.0), Option(1.0, 0.0)]]
    assert cheapest(options, 2.0) == (1, 1) and cheapest(options, 1.0) == (1, 0) and cheapest(options, 0.0) == (0, 0)


def test_a_choice_above_the_budget_by_less_than_the_tolerance_of_the_solver_is_not_taken() -> None:
    options = [[Option(0.0, 1.0), Option(1.0, 0.0)], [Option(0.0, 0.5), Option(1e-7, 0.0)]]
    assert cheapest(options, 1.0) == (1, 0)


def of_convnet() -> Space:
    return space(convnet().eval(), images()[0], pr.Recipe())


def curves(drops: dict[str, list[float]]) -> Scan:
    """A scan of `convnet` with these losses after each unit."""
    sizes = {"0": 8, "3": 6}
    return Scan(1.0, {n: tuple(((i + 1) / sizes[n], 1 - v) for i, v in enumerate(d)) for n, d in drops.items()}, 0)


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.4, 0.2, 0.1])
def test_a_solution_fits_when_it_is_recounted_exactly(fraction: float) -> None:
    cuts = of_convnet()
    scan = curves({"0": [0.1, 0.25, 0.4, 0.6, 0.9, 1.2, 2.0], "3": [0.3, 0.5, 0.8, 1.0, 1.6]})
    found = knapsack(cuts, pr.MACs(fraction), scan)
    counts = cuts.removed(found.shares)
    assert found.cost == cuts.cost(pr.MACs(1), counts) <= cuts.budget(pr.MACs(fraction))
    best = min(
        sum(dict([(0, 0.0), *((round(x * n), d) for x, d in scan.drops[name])])[c]
            for name, n, c in zip(cuts.names, cuts.sizes, choice, strict=True))
        for choice in itertools.product(range(8), range(6))
        if cuts.cost(pr.MACs(1), choice) <= cuts.budget(pr.MACs(fraction))
    )  # fmt: skip
    assert best <= -found.value <= 1.5 * best  # linear costs are an approximation, and repaired
    plan = pr.plan(cuts.model, cuts.inputs, pr.Recipe(allocation=found.allocation), target=pr.MACs(fraction))
    assert plan.after.macs <= fraction * plan.before.macs


def test_any_cost_may_be_predicted_and_impossible_ones_are_missed() -> None:
    cuts = of_convnet()
    scan = curves({"0": [0.1, 0.2, 0.3, 0.4], "3": [0.1, 0.2, 0.3]})
    found = knapsack(cuts, pr.Latency(0.6), scan, predict=lambda counts: 100.0 - 10 * counts[0] - 5 * counts[1])
    assert found.cost <= 60 and cuts.removed(found.shares) == (4, 0)
    with pytest.raises(pr.PruningError, match="all groups at their last option leave 45"):
        knapsack(cuts, pr.Latency(0.4), scan, predict=lambda counts: 100.0 - 10 * counts[0] - 5 * counts[1])


def test_a_table_knows_both_sides_of_a_layer() -> None:
    from prunella.search import latency_table

    cuts = of_convnet()

    def clock(models: object, inputs: object) -> dict[str, dict[str, float]]:
        assert isinstance(models, dict)
        return {
            name: {**{module: 1e-6 * net.get_submodule(module).weight.numel() for module in ("0", "3", "7")}, "1": 1e-3}
            for name, net in models.items()
        }

    table = latency_table(cuts, measure=clock)
    for counts in ((0, 0), (4, 3), (8 - 2, 6 - 1)):
        small = cuts.cut(counts)
        expected = 1 + sum(1e-3 * small.get_submodule(name).weight.numel() for name in ("0", "3", "7"))
        assert table(counts) == pytest.approx(expected, rel=0.02)
    assert table((4, 0)) == pytest.approx(table((0, 0)) - 1e-3 * (108 + 216), rel=0.02)
    assert torch.is_grad_enabled()
