"""The target `Latency`: its search with a clock that says what it is told, and once with the real one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunella as pr
from prunella.measure.timing import Timing
from prunella.planning.budget import ladder, solve
from prunella.planning.latency import MOST, in_order, search_latency
from prunella.targets import TOLERANCE, Latency, parse_target
from tests.graphs import IMAGE, convnet, mlp

Ratio = Callable[[tuple[int, ...]], float]


def timing(ratio: float, dense: float = 10.0) -> Timing:
    return Timing(dense, dense * ratio, ratio * 0.99, ratio * 1.01, "by a fake clock")


class Clock:
    """Ratios by a formula, and how often they were asked for."""

    def __init__(self, ratio: Ratio, noise: Callable[[int], float] = lambda _: 1.0) -> None:
        self.ratio, self.noise, self.asked = ratio, noise, list[tuple[tuple[int, ...], bool]]()

    def __call__(self, counts: tuple[int, ...], again: bool) -> Timing:
        self.asked.append((counts, again))
        return timing(self.ratio(counts) * self.noise(len(self.asked)))


def rungs(*sizes: int) -> list[Any]:
    return [ladder((torch.arange(n, dtype=torch.float64) + 0.5) / n, 0.0, 1) for n in sizes]


def left(sizes: tuple[int, ...], counts: tuple[int, ...]) -> float:
    return sum(n - c for n, c in zip(sizes, counts, strict=True)) / sum(sizes)


SIZES = (64, 200, 33)
STRAIGHT = functools.partial(left, SIZES)


@settings(deadline=None)
@given(st.floats(0.15, 0.97), st.sampled_from([1.0, 2.0, 0.5]))
def test_it_is_hit_within_the_tolerance_in_few_measurements(asked: float, power: float) -> None:
    clock = Clock(lambda counts: 0.01 + 0.99 * STRAIGHT(counts) ** power)
    found = search_latency(rungs(*SIZES), clock, STRAIGHT, Latency(asked))
    assert abs(clock.ratio(found) / asked - 1) <= TOLERANCE
    assert len(clock.asked) <= MOST + 1 and clock.asked[-1] == (found, True)


def test_milliseconds_are_a_part_of_the_measured_dense_time() -> None:
    clock = Clock(STRAIGHT)
    found = search_latency(rungs(*SIZES), clock, STRAIGHT, Latency(4.0))  # of 10
    assert abs(clock.ratio(found) / 0.4 - 1) <= TOLERANCE


def test_where_the_time_jumps_the_point_behind_the_jump_is_taken() -> None:
    def steps(counts: tuple[int, ...]) -> float:
        return math.ceil(4 * STRAIGHT(counts)) / 4 or 0.25

    found = search_latency(rungs(*SIZES), Clock(steps), STRAIGHT, Latency(0.6))
    kept = sum(SIZES) - sum(found)
    assert steps(found) == 0.5 and kept == math.floor(sum(SIZES) / 2)  # no more than the jump needs


def test_the_number_that_counts_is_the_second_one() -> None:
    """The first measurement of every point is a lie: the search goes on from what the second one says."""
    clock = Clock(STRAIGHT)

    def lying(counts: tuple[int, ...], again: bool) -> Timing:
        return timing(clock(counts, again).ratio * (1.0 if again else 0.93))

    found = search_latency(rungs(*SIZES), lying, STRAIGHT, Latency(0.5))
    assert abs(STRAIGHT(found) / 0.5 - 1) <= TOLERANCE


def test_no_speed_up_is_said_with_the_numbers() -> None:
    with pytest.raises(
        pr.PruningError, match=r"without all prunable units, 1.02 .* pruning gives no speed-up"
    ) as caught:
        search_latency(rungs(*SIZES), Clock(lambda counts: 1.02), STRAIGHT, Latency(0.6))
    assert "asked 0.6; measured 1.02 [1.01, 1.03]" in str(caught.value)
    with pytest.raises(pr.PruningError, match=r"0.703 of the dense time remains\n") as caught:
        search_latency(rungs(*SIZES), Clock(lambda counts: 0.7 + 0.3 * STRAIGHT(counts)), STRAIGHT, Latency(0.6))
    with pytest.raises(pr.PruningError, match="would remove nothing"):
        search_latency(rungs(*SIZES), Clock(STRAIGHT), STRAIGHT, Latency(12.0))


def test_even_groups_stay_even() -> None:
    found = search_latency(rungs(30, 30, 30), Clock(functools.partial(left, (30, 30, 30))),
                  functools.partial(left, (30, 30, 30)), Latency(0.5), equal_widths=True)  # fmt: skip
    assert len(set(found)) == 1


@given(st.lists(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_the_order_is_that_of_every_other_target(keys: list[list[float]], data: st.DataObject) -> None:
    ladders = [ladder(torch.tensor(sorted(k), dtype=torch.float64), 0.0, 1) for k in keys]
    owner, _ = in_order(ladders)
    steps = data.draw(st.integers(0, len(owner)))
    taken = tuple(torch.bincount(owner[:steps], minlength=len(ladders)).tolist())
    assert taken == solve(ladders, lambda pruned: sum(pruned) >= steps)


# -- in a plan --------------------


def by_parameters(dense: nn.Module, small: nn.Module, inputs: Any, small_inputs: Any) -> Timing:
    """A machine whose time is the number of parameters: the real smaller model has to be there."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (dense, small)]
    with torch.no_grad():
        assert small(small_inputs).shape == dense(inputs).shape
    return timing(sizes[1] / sizes[0], sizes[0] / 10)


def test_a_plan_builds_and_measures_the_real_smaller_model() -> None:
    model = mlp(200).eval()
    before = copy.deepcopy(model.state_dict())
    plan = pr.plan(model, torch.randn(2, 4), target=Latency(0.5, by_parameters))
    small = pr.shrink(model, plan)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert abs(share / 0.5 - 1) <= TOLERANCE and plan.got == pytest.approx(share)
    assert plan.after.latency == pytest.approx(plan.before.latency * share)
    assert "measured: " in plan.remarks[-1] and "by a fake clock" in str(plan) and "ms" in str(plan)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_plan_file_keeps_what_was_measured(tmp_path: Path) -> None:
    plan = pr.plan(mlp(200), torch.randn(2, 4), target=Latency(0.5, by_parameters))
    back = pr.io.load_plan(pr.io.save_plan(plan, tmp_path / "a.plan"))
    assert back.target == Latency(0.5) and (back.before, back.after) == (plan.before, plan.after)
    assert back.remarks == plan.remarks and str(back) == str(plan)


def test_a_time_that_cannot_be_met_is_a_missed_target() -> None:
    with pytest.raises(pr.PruningError, match="cannot be met"):
        pr.plan(convnet(), torch.randn(IMAGE), pr.Recipe(min_density=0.9), target=Latency(0.5, by_parameters))


@pytest.mark.parametrize("granularity", [pr.Element(), pr.Block(2, 2), pr.NM(2, 4)])
def test_masks_are_refused_with_a_sentence(granularity: Any) -> None:
    with pytest.raises(pr.PruningError, match=r"dense kernels multiply|cannot meet latency"):
        pr.plan(mlp(8), torch.randn(2, 4), pr.Recipe(granularity=granularity), target=Latency(0.5))


def test_gradual_pruning_keeps_the_clock_it_was_given() -> None:
    model = mlp(64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = pr.Pruner(model, optimizer, recipe=pr.Recipe(), target=Latency(0.5, by_parameters), steps=2, every=1,
                       inputs=torch.randn(2, 4), schedule=pr.schedules.linear)  # fmt: skip
    for _ in range(2):
        optimizer.step()
        pruner.step()
    assert sum(mask.sum() for mask in pr.masks_of(model).values()) < sum(p.numel() for p in model.parameters())


def test_the_real_clock_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4)).eval()
    plan = pr.plan(model, torch.randn(64, 8), target=Latency(0.7))
    assert 0 < plan.after.latency < plan.before.latency and "interleaved rounds" in plan.remarks[-1]
    assert isinstance(pr.shrink(model, plan), nn.Module)


# -- in words --------------------


def test_latencies_are_read() -> None:
    texts = {"latency=0.6": 0.6, "latency=60%": 0.6, "latency=12ms": 12, "Latency=0.05s": 50, "latency=2500us": 2.5}
    assert {text: parse_target(text).value for text in texts} == pytest.approx(texts)
    assert parse_target("latency=0.6") == Latency(0.6) != pr.MACs(0.6)
    assert (pr.Latency(0.6).name, str(pr.Latency(0.6))) == ("latency", "latency=0.6")


@pytest.mark.parametrize("text", ["latency=0.6ms", "latency=10us", "latency=12k", "macs=5ms", "latency=0"])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(pr.PruningError):
        parse_target(text)
