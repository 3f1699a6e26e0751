from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunella import schedules as schedule
from prunella.errors import RequestError
from prunella.registry.method import REGISTRY

SCHEDULES = [schedule.single_step, schedule.linear, schedule.cubic, schedule.cosine, schedule.exponential]


def test_cubic_gives_the_numbers_of_zhu_and_gupta() -> None:
    found = [0.9 * schedule.cubic(p) for p in (0.1, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.2439, 0.5203125, 0.7875, 0.8859375, 0.9], abs=1e-12)


def test_exponential_gives_the_densities_of_synflow() -> None:
    found = [1 - 0.99 * schedule.exponential(k / 5, rho=100) for k in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([0.3981, 0.1585, 0.0631, 0.0251, 0.01], abs=5e-5)


def test_linear_cosine_and_single_step_by_hand() -> None:
    assert [schedule.linear(p) for p in (0.25, 0.5)] == [0.25, 0.5]
    assert [schedule.cosine(p) for p in (0.25, 0.5)] == pytest.approx([0.14644660940672627, 0.5])
    assert [schedule.single_step(p) for p in (0, 1e-9, 0.5)] == [0, 1, 1]


@pytest.mark.parametrize("function", SCHEDULES)
def test_runs_from_exactly_0_to_exactly_1(function: schedule.Schedule) -> None:
    assert function(0.0) == 0.0
    assert function(1.0) == 1.0


@pytest.mark.parametrize("function", SCHEDULES)
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_never_falls_and_stays_between_0_and_1(function: schedule.Schedule, a: float, b: float) -> None:
    low, high = function(min(a, b)), function(max(a, b))
    assert 0 <= low <= 1 and 0 <= high <= 1
    assert low <= high + 1e-15


@pytest.mark.parametrize("rho", [1.5, 10, 7.3, 1e6])
def test_exponential_ends_at_1_for_every_rho(rho: float) -> None:
    assert schedule.exponential(1.0, rho=rho) == 1.0


@pytest.mark.parametrize("function", SCHEDULES)
@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_out_of_range_is_refused(function: schedule.Schedule, progress: float) -> None:
    with pytest.raises(RequestError, match="progress"):
        function(progress)


def test_rho_of_1_is_refused() -> None:
    with pytest.raises(RequestError, match="rho"):
        schedule.exponential(0.5, rho=1)


def test_all_are_registered() -> None:
    known = {m.function for m in REGISTRY.values() if m.kind == "schedule"}
    assert known >= set(SCHEDULES)


def test_acdc_goes_up_and_down_and_ends_sparse() -> None:
    curve = [schedule.acdc(k / 20, cycles=2, warmup=0.2, last=0.2) for k in range(21)]
    assert curve == [0] * 4 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3 + [1] * 5
    assert schedule.acdc(0.0) == 0 and schedule.acdc(1.0) == 1 and REGISTRY["acdc"].kind == "cycle"
    with pytest.raises(RequestError, match="are out of range"):
        schedule.acdc(0.5, warmup=0.6, last=0.5)


def test_rounds_say_whether_the_part_is_of_the_survivors_or_of_all() -> None:
    left = [1 - target.value for target in schedule.rounds(5, of_survivors=0.2)]
    assert left == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768])
    end = 1 - left[-1]
    assert left == pytest.approx([1 - end * schedule.exponential(k / 5, rho=0.8**-5) for k in range(1, 6)])
    assert [t.value for t in schedule.rounds(4, of_all=0.2)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    with pytest.raises(RequestError, match="either"):
        schedule.rounds(3)
    with pytest.raises(RequestError, match="keep no weight"):
        schedule.rounds(5, of_all=0.2)
