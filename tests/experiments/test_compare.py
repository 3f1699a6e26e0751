"""Ways and measures in one table, resumed where it was stopped."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import RequestError
from tests.stopping import stops_at, tick


def scaled(factor: float) -> nn.Linear:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(factor)
    return layer


def weight(model: nn.Module) -> float:
    assert not model.training and not torch.is_grad_enabled()
    return float(next(model.parameters())[0, 0])


def test_means_and_deviations_over_seeds_with_the_dense_model_first() -> None:
    found = pr.experiments.compare(
        scaled(9.0),
        {"a": lambda seed: scaled(seed), "b": lambda seed: scaled(2.0)},
        {"weight": weight},
        seeds=(1, 2, 6),
    )
    assert list(found.values) == ["dense", "a", "b"] and found.values["a"]["weight"] == (1, 2, 6)
    assert found.spread("a", "weight") == pytest.approx((3, math.sqrt(7)))
    assert found.spread("dense", "weight") == (9, 0) and found.spread("dense", "seconds")[0] == 0
    assert all(second > 0 for second in found.values["a"]["seconds"])
    assert "| a | 3 ± 2.6 |" in str(found) and "| dense | 9 ± 0 | 0 ± 0 |" in str(found)
    one = pr.experiments.compare(scaled(9.0), {"a": lambda seed: scaled(seed)}, {"weight": weight}, seeds=(4,))
    assert "| a | 4 |" in one.markdown()


def test_the_dense_model_is_measured_once() -> None:
    seen: list[float] = []

    def look(model: nn.Module) -> float:
        seen.append(weight(model))
        return 1.0

    found = pr.experiments.compare(scaled(9.0), {"a": lambda seed: scaled(seed)}, {"weight": look}, seeds=(1, 2, 6))
    assert seen == [9, 1, 2, 6] and found.values["dense"]["weight"] == (1, 1, 1)


CALLS: list[int] = []


def method(seed: int) -> nn.Module:
    """Says that it was called, and stops at a call that `stops_at` names."""
    CALLS.append(seed)
    tick()
    return scaled(seed)


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    CALLS.clear()
    dense = scaled(9.0)
    with stops_at(2):
        pr.experiments.compare(dense, {"a": method}, {"weight": weight}, seeds=(1, 2), folder=tmp_path)
    found = pr.experiments.compare(dense, {"a": method}, {"weight": weight}, seeds=(1, 2), folder=tmp_path)
    assert CALLS == [1, 2, 2] and found.values["a"]["weight"] == (1, 2)
    with pytest.raises(RequestError, match="not continued"):
        pr.experiments.compare(scaled(8.0), {"a": method}, {"weight": weight}, seeds=(1,), folder=tmp_path)


def test_a_function_that_measures_two_things_and_what_names_depend_on(tmp_path: Path) -> None:
    ways, both = {"a": lambda seed: scaled(seed)}, {("weight", "half"): lambda m: (weight(m), weight(m) / 2)}
    found = pr.experiments.compare(scaled(9.0), ways, both, seeds=(1, 2), folder=tmp_path, asked={"lr": 1})
    assert found.values["a"] == {"weight": (1, 2), "half": (0.5, 1), "seconds": found.values["a"]["seconds"]}
    assert pr.experiments.compare(scaled(9.0), ways, both, seeds=(1, 2), folder=tmp_path, asked={"lr": 1}) == found
    with pytest.raises(RequestError, match="not continued"):
        pr.experiments.compare(scaled(9.0), ways, both, seeds=(1, 2), folder=tmp_path, asked={"lr": 2})
    with pytest.raises(RequestError, match="returned 1 numbers"):
        pr.experiments.compare(scaled(9.0), ways, {("weight", "half"): weight}, seeds=(1,))
    with pytest.raises(RequestError, match="nothing to compare"):
        pr.experiments.compare(scaled(9.0), ways, {"weight": weight, ("weight", "half"): weight}, seeds=(1,))


def test_a_way_or_a_measure_that_has_changed_is_run_again(tmp_path: Path) -> None:
    CALLS.clear()
    compare = partial(pr.experiments.compare, scaled(9.0), seeds=(1,), folder=tmp_path)
    compare({"a": method}, {"weight": weight})
    compare({"a": method, "b": lambda seed: scaled(seed)}, {"weight": weight})
    assert CALLS == [1]  # a further row leaves the others as they are
    found = compare({"a": method}, {"weight": lambda model: 2 * weight(model)})
    assert CALLS == [1, 1] and found.values["a"]["weight"] == (2,) and found.values["dense"]["weight"] == (18,)
    assert compare({"a": lambda seed: scaled(seed + 1)}, {"weight": weight}).values["a"]["weight"] == (2,)


def test_nothing_to_compare_is_said() -> None:
    for ways, measures in (({}, {"w": weight}), ({"a": scaled}, {}), ({"dense": scaled}, {"w": weight}),
                           ({"a": scaled}, {"seconds": weight})):  # fmt: skip
        with pytest.raises(RequestError, match="nothing to compare"):
            pr.experiments.compare(scaled(1.0), ways, measures)
