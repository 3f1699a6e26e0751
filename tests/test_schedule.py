from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunella import schedule
from prunella.errors import RequestError
from prunella.method import REGISTRY

SCHEDULES = [schedule.one_shot, schedule.linear, schedule.cubic, schedule.cosine, schedule.exponential]


def test_cubic_gives_the_numbers_of_zhu_and_gupta() -> None:
    found = [0.9 * schedule.cubic(p) for p in (0.1, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.2439, 0.5203125, 0.7875, 0.8859375, 0.9], abs=1e-12)


def test_exponential_gives_the_densities_of_synflow() -> None:
    found = [1 - 0.99 * schedule.exponential(k / 5, rho=100) for k in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([0.3981, 0.1585, 0.0631, 0.0251, 0.01], abs=5e-5)


def test_linear_cosine_and_one_shot_by_hand() -> None:
    assert [schedule.linear(p) for p in (0.25, 0.5)] == [0.25, 0.5]
    assert [schedule.cosine(p) for p in (0.25, 0.5)] == pytest.approx([0.14644660940672627, 0.5])
    assert [schedule.one_shot(p) for p in (0, 1e-9, 0.5)] == [0, 1, 1]


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
