"""What a model keeps from call to call decides its next call: a cut is right on both, and planning changes nothing."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.data import Setting
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify

RECIPE = pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform)
CALLS, TABLE = 0, dict[Any, Any]()


class Slot:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Keeps(nn.Module):
    """Where `side` says so, the channels of `a` are coupled with one another; `free` is beside the branch."""

    of_class = 0

    def __init__(self, side: Callable[[Keeps, Tensor], Any]) -> None:
        super().__init__()
        self.side, self.count, self.limit, self.size, self.flag = [side], 0, 55, None, False
        self.steps, self.sizes, self.slot, self.table = itertools.count(), deque[int](maxlen=4), Slot(), {}
        self.a, self.b, self.free, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 3), (6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y.flip(-1) if self.side[0](self, x) else y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


def _counted(net: Any, _: Tensor) -> bool:
    net.count += 1
    return bool(net.count > 1)


def _late(net: Any, _: Tensor) -> bool:
    net.count += 1
    return bool(net.count >= 300)


def _by_attribute(net: Any, _: Tensor) -> bool:
    net.count += 1
    return bool(net.count > net.limit)


def _every_fourth(net: Any, _: Tensor) -> bool:
    net.count += 1
    return bool(net.count % 4 == 0)


def _other_size(net: Any, x: Tensor) -> bool:
    net.size = net.size or x.shape[1]
    return bool(net.size != x.shape[1])


def _flag(net: Any, _: Tensor) -> bool:
    before, net.flag = net.flag, True
    return bool(before)


def _iterator(net: Any, _: Tensor) -> bool:
    return bool(next(net.steps) > 0)


def _queue(net: Any, x: Tensor) -> bool:
    net.sizes.append(x.shape[1])
    return len(net.sizes) > 1


def _slot(net: Any, _: Tensor) -> bool:
    net.slot.count += 1
    return bool(net.slot.count > 1)


def _table(net: Any, x: Tensor) -> bool:
    known = int(x.shape[1]) in net.table
    net.table[int(x.shape[1])] = 1
    return known


def _global(_: Any, __: Tensor) -> bool:
    global CALLS
    CALLS += 1
    return CALLS > 1


def _global_table(_: Any, x: Tensor) -> bool:
    known = int(x.shape[1]) in TABLE
    TABLE[int(x.shape[1])] = 1
    return known


def _class(net: Any, _: Tensor) -> bool:
    type(net).of_class += 1
    return bool(type(net).of_class > 1)


SIDES = (_counted, _late, _by_attribute, _every_fourth, _other_size, _flag, _iterator, _queue, _slot, _table)
BESIDE = (_global, _global_table, _class)


@pytest.fixture(autouse=True)
def _beside() -> Any:
    yield
    global CALLS
    CALLS, Keeps.of_class = 0, 0
    TABLE.clear()


@pytest.mark.parametrize("side", (*SIDES, *BESIDE))
def test_a_cut_is_right_on_further_calls(side: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Keeps(side).eval(), torch.randn(2, 5, 6)
    plan = pr.plan(model, x, RECIPE, target=pr.Params(0.9))
    cut = plan.changes.cuts["a.weight"][0].tolist() if "a" in plan.keep else list(range(8))
    assert cut == [7 - unit for unit in reversed(cut)], "the units of a are in another order on some call"
    small = pr.shrink(model, plan)
    for setting in (Setting(before=(x,)), Setting(before=(x, x, x)), Setting(before=(torch.randn(2, 9, 6),))):
        assert verify(model, small, plan.changes, x, setting=setting).exact


@pytest.mark.parametrize("side", (*SIDES, *BESIDE))
def test_planning_leaves_what_the_model_keeps(side: Callable[[Any, Tensor], Any]) -> None:
    model = Keeps(side).eval()
    before = copy.deepcopy(
        {name: value for name, value in vars(model).items() if name not in {"slot", "steps", "side"}}
    )
    couple(model, torch.randn(2, 5, 6))
    assert (CALLS, TABLE, Keeps.of_class, model.slot.count) == (0, {}, 0, 0)
    now = {name: value for name, value in vars(model).items() if name in before and not name.startswith("_")}
    assert now == {name: before[name] for name in now}


class Cached(nn.Module):
    """Keeps sizes and a tensor of the size of its units, by that size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.shapes: dict[Any, Any] = {}
        self.scales: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        key = tuple(y.shape)
        if key not in self.shapes:
            self.shapes[key], self.scales[key] = (y.shape[0], -1, y.shape[2]), torch.ones(y.shape[2])
        return self.b(y.view(self.shapes[key]) * self.scales[key])  # type: ignore[no-any-return]


def test_a_cache_by_size_costs_no_units() -> None:
    model, x = Cached().eval(), torch.randn(2, 5, 6)
    plan = pr.plan(model, x, RECIPE, target=pr.Params(0.8))
    assert set(plan.keep) == {"a"}
    assert verify(model, pr.shrink(model, plan), plan.changes, x, setting=Setting(before=(x,))).exact


def test_sizes_that_an_earlier_run_has_cached_are_named_as_such() -> None:
    model, x = Cached().eval(), torch.randn(2, 5, 6)
    model(x)
    reason = next(entry.reason for entry in couple(model, x).frozen if entry.entity == "a.weight")
    assert "shapes" in reason or "scales" in reason or "meets a tensor that is not cut" in reason


class KeepsTensors(nn.Module):
    """Keeps what it has computed in `form`; `free` is beside it."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form, self.last = [form], form(torch.zeros(2, 8))
        self.a, self.b, self.free, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 3), (6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        self.last = self.form[0](y)
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a pair": lambda y: (y, 2 * y),
    "a number and a pair": lambda y: (1, ("text", y), None),
    "an array": lambda y: (np.zeros(3), y),
    "a list in a tuple": lambda y: ([y], {"y": y}),
    "a named tuple": lambda y: torch.max(y, 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_tensors_that_are_kept_in_tuples_keep_their_units(form: Callable[[Tensor], Any]) -> None:
    model, x = KeepsTensors(form).eval(), torch.randn(2, 6)
    plan = pr.plan(model, x, RECIPE, target=pr.Params(0.8))
    assert set(plan.keep) == {"free"}
    assert any(entry.entity == "a.weight" for entry in plan.frozen)
    assert verify(model, pr.shrink(model, plan), plan.changes, x, setting=Setting(before=(x,))).exact
