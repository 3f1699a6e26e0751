"""Whether two runs execute the same: a line stands for its instructions only where none of them runs alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product

import pytest
from torch import nn

from prunella.model.executed import ExecutedSteps, executed

MODEL = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def straight(a: int, b: int) -> int:
    c = a + b
    return c * 2


def one_line(a: int, b: int) -> int:
    return 1 if a and b else 2


def chained(a: int, b: int) -> int:
    found = 3
    if a > 0 and b > 0:
        found = 4
    return found


def caught(a: int, b: int) -> int:
    try:
        return a // b
    except ZeroDivisionError:
        return 0
    finally:
        a += 1


def looped(a: int, b: int) -> int:
    total = sum(n for n in range(a) if n != b)
    while a > b + 1:
        a -= 1
        total += a if b else 1
    return total


def steps_of(function: Callable[[int, int], int], a: int, b: int) -> ExecutedSteps:
    with executed(MODEL) as steps:
        function(a, b)
    return steps


def test_another_side_of_a_line_is_something_new() -> None:
    for function in (one_line, chained, caught, looped):
        seen = {(a, b): steps_of(function, a, b) for a, b in product(range(3), repeat=2)}
        assert len({frozenset(map(frozenset, steps.steps.values())) for steps in seen.values()}) > 1, function


@pytest.mark.parametrize(("first", "second"), [((0, 0), (1, 0)), ((1, 0), (1, 1)), ((0, 1), (1, 1))])
def test_parts_of_a_condition_are_told_apart(first: tuple[int, int], second: tuple[int, int]) -> None:
    assert not steps_of(one_line, *second) <= steps_of(one_line, *first)
    assert not steps_of(chained, *second) <= steps_of(chained, *first)


def test_the_same_side_is_nothing_new() -> None:
    assert steps_of(straight, 1, 2) <= steps_of(straight, 3, 4)
    assert steps_of(chained, 1, 2) <= steps_of(chained, 3, 4)
    assert steps_of(looped, 3, 0) <= steps_of(looped, 4, 0)


def test_a_loop_that_is_passed_over_and_another_turn_are_something_new() -> None:
    assert not steps_of(looped, 0, 0) <= steps_of(looped, 2, 0)
    assert not steps_of(looped, 3, 0) <= steps_of(looped, 2, 0)


def test_what_was_seen_is_added() -> None:
    seen = steps_of(one_line, 0, 0)
    assert not steps_of(one_line, 1, 1) <= seen
    seen.add(steps_of(one_line, 1, 1))
    assert steps_of(one_line, 1, 1) <= seen


def test_what_runs_when_garbage_is_collected_is_no_step() -> None:
    def collected(phase: str, _: object) -> str:
        return "starts" if phase == "start" else "stops"

    thresholds = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    try:
        with executed(MODEL) as steps:
            kept = [[number] for number in range(50)]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
    assert len(kept) == 50 and collected.__code__ not in steps.steps and gc.isenabled()


def test_modules_that_run_are_steps() -> None:
    import torch

    with executed(MODEL) as steps:
        MODEL[0](torch.zeros(1, 2))
    assert steps.modules == {id(MODEL[0])}
