"""Branches on sizes and values that the example does not take: followed, frozen or named, never silent."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.cut.changes import changes
from prunella.graph.guesses import Seen, sizes_to_try
from prunella.graph.other_sizes import wrong_branch
from prunella.graph.solve.groups import couple
from prunella.graph.trace.tracked_int import Shape, SizeComparison, Tracked
from prunella.graph.verify import verify

RECIPE = pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform)
TABLE = {12: True}
THRESHOLD = 20


class Branching(nn.Module):
    """One side couples the channels of `a` with one another; `free` is beside the branch."""

    def __init__(self, side: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.side = side
        self.a, self.free = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.mix, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.side(x):
            y = self.mix(y).relu() + y[:, [7, 6, 5, 4, 3, 2, 1, 0]]
        return self.b(y) + self.c(self.free(x).relu())


def _iterated(x: Tensor) -> bool:
    return sum(1 for _ in x) > 10


SIZES: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "height is not width": (lambda x: x.shape[2] != x.shape[3], (2, 3, 8, 12)),
    "height over width": (lambda x: x.shape[2] / x.shape[3] > 4, (2, 3, 64, 8)),
    "width equals channels": (lambda x: x.shape[3] == x.shape[1], (2, 3, 8, 3)),
    "samples over height": (lambda x: x.shape[0] > x.shape[2], (9, 3, 8, 8)),
    "len": (lambda x: len(x) > 16, (20, 3, 8, 8)),
    "iterated": (_iterated, (20, 3, 8, 8)),
    "parts": (lambda x: len(x.split(8, 2)) > 2, (2, 3, 32, 32)),
    "table": (lambda x: TABLE.get(x.shape[2], False), (2, 3, 12, 12)),
    "set": (lambda x: x.shape[2] in {12, 24}, (2, 3, 12, 12)),
    "text": (lambda x: f"{x.shape[2]}" == "12", (2, 3, 12, 12)),
    "odd": (lambda x: x.shape[2] % 2, (2, 3, 9, 8)),
    "float": (lambda x: x.shape[2] > 40.5, (2, 3, 48, 8)),
    "logarithm": (lambda x: math.log2(x.shape[2]) > 5, (2, 3, 48, 8)),
    "global": (lambda x: x.shape[2] * 0.5 > THRESHOLD, (2, 3, 48, 8)),
    "computed": (lambda x: nn.functional.conv2d(x, x.new_ones(1, 3, 3, 3), stride=2).shape[3] > 10, (2, 3, 32, 32)),
}


class Limits:
    """A helper that knows the numbers."""

    low, high, limit = 50, 500, 20
    __slots__ = ()

    def above(self, number: float) -> bool:
        return number > self.limit

    @staticmethod
    def exactly(number: float) -> bool:
        return number == 37

    @classmethod
    def within(cls, number: float) -> bool:
        return cls.low < number < cls.high


class Decides(nn.Module):
    def forward(self, number: float) -> bool:
        return number == 37


LIMITS, DECIDES = Limits(), Decides()


def _exactly(number: float) -> bool:
    return _deeper(number)


def _deeper(number: float, *, wanted: int = 37) -> bool:
    return number == wanted


PARTIAL = functools.partial(_deeper, wanted=41)


def _closure(number: int) -> Callable[[Tensor], bool]:
    return lambda x: int(x.shape[2]) == number


SIZES |= {
    "method": (lambda x: LIMITS.above(int(x.shape[2])), (2, 3, 48, 8)),
    "static method": (lambda x: LIMITS.exactly(int(x.shape[2])), (2, 3, 37, 8)),
    "class method": (lambda x: Limits.within(float(x.shape[2])), (2, 3, 64, 8)),
    "function": (lambda x: _exactly(int(x.shape[2])), (2, 3, 37, 8)),
    "module of numbers": (lambda x: DECIDES(int(x.shape[2])), (2, 3, 37, 37)),
    "cell": (_closure(37), (2, 3, 37, 8)),
    "partial": (lambda x: PARTIAL(int(x.shape[2])), (2, 3, 41, 8)),
    "bytes": (lambda x: x.nbytes > 20_000, (2, 3, 64, 64)),
    "bytes of an element": (lambda x: x.element_size() * x.numel() > 20_000, (2, 3, 64, 64)),
    "item size": (lambda x: x.itemsize * x.nelement() > 20_000, (2, 3, 64, 64)),
    "bytes of the memory": (lambda x: x.untyped_storage().nbytes() > 20_000, (2, 3, 64, 64)),
}
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda x: x.max() > 30,
    "window": lambda x: (x.max() > 50) & (x.max() < 500),
    "item": lambda x: x.max().item() > 30,
    "int": lambda x: int(x.abs().sum()) > 3000,
    "index": lambda x: [False, True][(x.max() > 30).int()],
    "equal": lambda x: not torch.equal(x.clamp(max=30), x),
    "contains": lambda x: 100.0 in x[0, 0, 0],
    "size by value": lambda x: (x > 30).nonzero().shape[0] > 0,
    "mask": lambda x: x[x > 30].numel(),
    "numpy": lambda x: x.numpy().max() > 30,
    "list": lambda x: max(x.flatten().tolist()) > 30,
    "in a function": lambda x: LIMITS.within(x.max().item()),
    "in a lambda": lambda x: (lambda value: 50 < value < 500)(x.max().item()),
}
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "is_contiguous": lambda x: not x.is_contiguous(),
    "format": lambda x: x.is_contiguous(memory_format=torch.channels_last),
    "stride": lambda x: x.stride(1) == 1,
    "strides": lambda x: x.stride()[-1] != 1,
}


def _cut(model: nn.Module, example: Tensor, other: Tensor) -> pr.Plan:
    torch.manual_seed(0)
    plan = pr.plan(model, example, RECIPE, target=pr.Params(0.9))
    small = pr.shrink(model, plan)
    assert bool(model.side(example)) is not bool(model.side(other)), "the other input takes the other side"
    assert verify(model, small, plan.changes, other).exact
    return plan


@pytest.mark.parametrize(("side", "shape"), SIZES.values(), ids=SIZES)
def test_a_branch_on_sizes_is_tried_on_its_other_side(side: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    plan = _cut(Branching(side).eval(), torch.randn(2, 3, 8, 8), torch.randn(shape))
    assert set(plan.keep) == {"free"}, "what the other side leaves free is pruned"
    assert plan.others, "the size is an example of the plan"


@pytest.mark.parametrize("side", VALUES.values(), ids=VALUES)
def test_a_branch_on_values_is_tried_on_its_other_side(side: Callable[[Tensor], Any]) -> None:
    other = torch.randn(2, 3, 8, 8) * 20
    other[0, 0, 0, 0] = 100.0
    plan = _cut(Branching(side).eval(), torch.randn(2, 3, 8, 8).clamp(-3, 3), other)
    assert set(plan.keep) == {"free"}


@pytest.mark.parametrize("side", LAYOUTS.values(), ids=LAYOUTS)
def test_a_branch_on_the_order_in_memory_is_tried_on_its_other_side(side: Callable[[Tensor], Any]) -> None:
    other = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    plan = _cut(Branching(side).eval(), torch.randn(2, 3, 8, 8), other)
    assert set(plan.keep) == {"free"}
    assert any("2x3x8x8 with strides 192x1x24x3" in remark for remark in plan.remarks)


def test_a_branch_on_gradients_is_tried_on_its_other_side() -> None:
    x = torch.randn(2, 3, 8, 8)
    plan = _cut(Branching(lambda given: given.requires_grad).eval(), x, x.clone().requires_grad_())
    assert set(plan.keep) == {"free"}


def _unpacked(x: Tensor) -> bool:
    try:
        _, _, _ = x.shape
    except ValueError:
        return False
    return True


RANKS: dict[str, Callable[[Tensor], Any]] = {
    "dim": lambda x: x.dim() == 3,
    "ndim": lambda x: x.ndim > 2,
    "length of the shape": lambda x: len(x.shape) == 3,
    "unpacked": _unpacked,
    "table": lambda x: (False, False, False, True)[x.dim()],
    "part of the shape": lambda x: x.shape[2:],
}


class ByRank(nn.Module):
    """One side reverses the units of `a`; `free` is beside the branch."""

    def __init__(self, side: Callable[[Tensor], Any], *, turned: bool) -> None:
        super().__init__()
        self.side, self.turned = side, turned
        self.a, self.b, self.free, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 3), (6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y.flip(-1) + y if bool(self.side(x)) is not self.turned else y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", RANKS.values(), ids=RANKS)
def test_a_branch_on_the_number_of_axes_is_tried_on_its_other_side(side: Callable[[Tensor], Any], turned: bool) -> None:
    torch.manual_seed(0)
    matrix, sequence = torch.randn(4, 6), torch.randn(4, 5, 6)
    model, x, other = ByRank(side, turned=turned).eval(), *((sequence, matrix) if turned else (matrix, sequence))
    plan = pr.plan(model, x, RECIPE, target=pr.Params(0.9))
    small = pr.shrink(model, plan)
    assert verify(model, small, plan.changes, other).exact
    assert plan.keep["free"].sum() < 8 and (len(plan.others) == 1 or "a" not in plan.keep)


def test_where_the_source_asks_for_no_axes_no_other_number_of_axes_is_an_example() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    assert pr.plan(model, torch.randn(4, 6), RECIPE, target=pr.Params(0.8)).others == ()


class ManyBranches(nn.Module):
    """More branches on values than are tried; the last one couples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, m = self.a(x).relu(), x.max()
        if m > 11:
            x = x + 1
        if m > 12:
            x = x + 1
        if m > 13:
            x = x + 1
        if m > 14:
            x = x + 1
        if m > 15:
            x = x + 1
        if m > 16:
            x = x + 1
        if m > 17:
            x = x + 1
        if m > 18:
            x = x + 1
        if m > 19:
            y = y.flip(-1)
        return self.b(y) + x.mean()  # type: ignore[no-any-return]


def test_what_the_source_holds_at_a_branch_that_is_not_tried_stays() -> None:
    with pytest.raises(pr.PruningError, match="the other side of a branch on a value was not traced"):
        pr.plan(ManyBranches().eval(), torch.randn(2, 6), RECIPE, target=pr.Params(0.9))


def test_a_branch_without_a_fault_costs_no_units() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if torch.isnan(x).any():
                raise ValueError("nan")
            y = self.a(x)
            return self.b(y.clamp(max=1) if x.max() > 1e6 else y)

    graph = couple(Guarded().eval(), torch.randn(2, 6))
    assert [group.name for group in graph.groups] == ["a"]
    assert [branch.fault for branch in graph.branches] == ["", ""]


class Unseen(nn.Module):
    """The other side does not run: its layer takes another width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(7, 8)
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.after(self.before(x).relu()))
        if x.max() > 1e6:
            y = self.other(y)
        return self.b(y)


def test_what_a_side_that_does_not_run_may_read_stays_and_the_plan_names_the_line() -> None:
    plan = pr.plan(Unseen().eval(), torch.randn(2, 6), RECIPE, target=pr.Params(0.9))
    assert set(plan.keep) == {"before", "after"}, "the source holds neither at the branch"
    line = next(remark for remark in plan.remarks if "one side of a branch" in remark)
    assert "test_branches.py:" in line and "the other side was not traced" in line
    reason = next(entry for entry in plan.frozen if entry.entity == "a.weight")
    assert reason.reason == "the other side of a branch on a value was not traced"
    assert reason.where in line


def test_the_other_side_of_a_branch_is_verified() -> None:
    model, x = Branching(VALUES["bool"]).eval(), torch.randn(2, 3, 8, 8).clamp(-3, 3)
    graph = couple(model, x)
    keep = {"free": torch.arange(8) > 2}
    assert wrong_branch(model, graph, keep, x) == ""
    alone = couple(Branching(lambda _: False).eval(), x)
    wrong = {"a": torch.arange(8) > 2}
    assert "test_branches.py:" in wrong_branch(model, dataclasses.replace(alone, branches=graph.branches), wrong, x)
    assert changes(alone, wrong)


def test_arithmetic_of_sizes_is_followed() -> None:
    seen: list[Any] = []
    size = Tracked(9, Shape((), 9), seen.append)
    for value, number in ((abs(-size), 9), (size**2, 81), (divmod(size, 4)[1], 1), (20 % size, 2)):
        assert isinstance(value, Tracked) and value == number
    assert not any(isinstance(entry, Shape) for entry in seen)
    seen.clear()
    assert bool(size) and size > 8.5
    assert all(isinstance(entry, SizeComparison) for entry in seen) and len(seen) == 2
    assert size**-1 == pytest.approx(1 / 9) and isinstance(seen[-1], Shape)


def test_sizes_that_the_source_names_are_tried_nearest_first() -> None:
    graph = couple(Branching(SIZES["set"][0]).eval(), torch.randn(2, 3, 8, 8))
    tried = sizes_to_try(torch.randn(2, 3, 8, 8), graph.hints)
    assert (frozenset({2, 3}), 12, True) in tried and tried[0][1] in {7, 9, 12, 13}
    table = couple(Branching(SIZES["table"][0]).eval(), torch.randn(2, 3, 8, 8)).hints
    assert 12 in table.keys, "a key of a table is tried whether or not other instructions run"


def test_a_run_tells_whether_it_does_something_new() -> None:
    model = Branching(VALUES["bool"]).eval()
    seen = Seen(model, [torch.zeros(2, 3, 8, 8)])
    assert not seen.new(torch.zeros(2, 3, 8, 8)) and seen.new(torch.full((2, 3, 8, 8), 99.0))
    assert not seen.new(torch.full((2, 3, 8, 8), math.nan)), "outputs that are not finite tell nothing"


class InOneMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.b.weight = nn.Parameter(self.a.weight.detach().t())
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu())).relu())


@pytest.mark.parametrize("granularity", [pr.Channel(), pr.Element()])
def test_two_parameters_in_one_memory_stay(granularity: pr.Channel | pr.Element) -> None:
    model, recipe = InOneMemory().eval(), dataclasses.replace(RECIPE, granularity=granularity)
    target = pr.Params(0.8) if isinstance(granularity, pr.Channel) else pr.Sparsity(0.3)
    plan = pr.plan(model, torch.randn(2, 8), recipe, target=target)
    assert {row.name for row in plan.rows} <= {"c", "d"}
    reasons = {entry.entity: entry.reason for entry in plan.frozen}
    why = "the parameters a.weight and b.weight share one memory: tie them as one parameter"
    assert reasons["a.weight"] == reasons["b.weight"] == why


class Parts(nn.Module):
    def __init__(self, **others: float) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(4, 3), nn.Linear(8, 3)
        self.parts: dict[Any, Any] = {0: 4, 1: 8, **others}

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.a(x), [self.parts[0], self.parts[1]], 1)
        return self.b(first) + self.c(second)


def test_sizes_in_a_table_follow() -> None:
    model, x = Parts().eval(), torch.randn(2, 8)
    small = pr.shrink(model, pr.plan(model, x, RECIPE, target=pr.Params(0.8)))
    assert small.parts == {0: small.b.in_features, 1: small.c.in_features} != model.parts == {0: 4, 1: 8}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_size_in_a_table_of_other_numbers_is_named_and_follows_in_a_program() -> None:
    model, x = Parts(rate=0.5).eval(), torch.randn(2, 8)
    reason = next(entry.reason for entry in couple(model, x).frozen if entry.entity == "a.weight")
    assert reason == "the size 4 is in the dict parts, which no cut changes"
    plan = pr.plan(pr.as_program(model, x), x, RECIPE, target=pr.Params(0.9))
    assert {row.name: row.counted_with for row in plan.rows} == {"a": "", "a#2": "a"}
    assert "in a" in str(plan)


def test_the_reason_for_a_weight_that_is_used_both_ways_is_true() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.e(x).relu(), self.e.weight.t())

    magnitude = dataclasses.replace(RECIPE, criterion=pr.magnitude)
    with pytest.raises(pr.PruningError, match=r"there is only e\.weight, which reads the units"):
        pr.plan(Tied().eval(), torch.randn(2, 8), magnitude, target=pr.Params(0.9))


def test_a_model_of_quantized_layers_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(pr.PruningError, match="prune the model before its weights are converted"):
        pr.plan(quantized, torch.randn(2, 8), RECIPE, target=pr.Params(0.9))
