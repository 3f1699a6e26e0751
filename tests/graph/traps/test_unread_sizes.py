"""Sizes that only another method reads: they follow the one size they equal, or the plan names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracle import assert_untouched, snapshot
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple

RECIPE = pr.Recipe(pr.criteria.random)
IMAGE = torch.randn(2, 3, 5, 5)


class Split(nn.Module):
    """`forward` chunks, and the path of an exporter splits by a size that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 16
        self.a, self.b, self.m = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).chunk(2, 1)
        out: Tensor = self.b(torch.cat([u, self.m(v)], 1))
        return out

    def forward_split(self, x: Tensor) -> Tensor:
        u, v = self.a(x).split((self.c, self.c), 1)
        out: Tensor = self.b(torch.cat([u, self.m(v)], 1))
        return out


class Own(nn.Module):
    """A linear layer of one's own, which keeps its sizes for others."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.num_features, self.shape = after, [after, before]
        self.weight = nn.Parameter(torch.randn(after, before))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def extra_repr(self) -> str:
        return f"{self.num_features} of {tuple(self.shape)}"

    def reset_parameters(self) -> None:
        self.weight.data = torch.randn(self.num_features, self.shape[1])


@dataclass
class Config:
    """A plain configuration, with a number that is not a size."""

    width: int = 24
    epochs: int = 24


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.config.epochs = 90
        self.one, self.two = Own(6, 24), Own(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu())
        return out


def test_the_size_of_another_path_follows_with_a_remark() -> None:
    model = Split().eval()
    before = snapshot(model)
    plan = pr.plan(model, IMAGE, RECIPE, target=pr.Sparsity(0.25))
    assert_untouched(before, snapshot(model))
    assert plan.attributes == {("", "c"): 12}
    assert "c of the model: 16 -> 12, read by no traced operation" in plan.remarks
    small: Any = pr.shrink(model, plan)
    torch.testing.assert_close(small.forward_split(IMAGE), small(IMAGE))


def test_sizes_in_lists_and_in_a_plain_configuration_follow(tmp_path: Path) -> None:
    model = Head().eval()
    plan = pr.plan(model, torch.randn(2, 6), RECIPE, target=pr.Sparsity(0.5))
    small: Any = pr.shrink(model, plan)
    assert (small.one.num_features, small.one.shape, small.two.shape) == (12, [12, 6], [10, 12])
    assert (small.config.width, small.config.epochs) == (12, 90) and str(small.one) == "Own(12 of (12, 6))"
    assert (model.one.shape, model.config.width) == ([24, 6], 24)
    small.one.reset_parameters()
    assert small(torch.randn(2, 6)).shape == (2, 10)
    assert "shape[1] of two: 24 -> 12, read by no traced operation" in plan.remarks
    saved = pr.save(pr.shrink(model, plan), tmp_path / "small", plan=plan, factory=Head)
    again: Any = pr.load(saved.path, factory=Head)
    assert (again.one.shape, again.config.width) == ([12, 6], 12)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return out


def test_a_size_that_becomes_several_is_named_and_stays() -> None:
    model = Several().eval()
    graph = couple(model, torch.randn(2, 6))
    keep = {"a": torch.arange(16) < 12, "b": torch.arange(16) < 8}
    plan = pr.Plan.of_structure(graph, keep)
    assert plan.attributes == {}
    assert "width of the model is left at 16, read by no traced operation: its size may be 8 or 12 now" in plan.remarks
    same = pr.Plan.of_structure(graph, {name: torch.arange(16) < 12 for name in keep})
    assert same.attributes == {("", "width"): 12}


class Numbers(nn.Module):
    """Integers of the value of a width that are no width."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.num_layers, self.times = 8, 6, 5
        self.first, self.layers = nn.Conv2d(3, 8, 1), nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(6)])
        self.five, self.last = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 6, 1)
        self.six = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x).relu()
        x = self.five(x).relu()
        for _ in range(self.times):
            x = x + 1
        out: Tensor = self.six(self.last(x).relu())
        return out


def test_an_image_size_a_number_of_layers_and_what_is_read_stay() -> None:
    model = Numbers().eval()
    plan = pr.plan(model, torch.randn(1, 3, 8, 8), RECIPE, target=pr.Sparsity(0.3))
    small: Any = pr.shrink(model, plan)
    assert small.first.out_channels < 8 and small.five.out_channels < 5 and small.last.out_channels < 6
    assert (small.image_size, small.num_layers, small.times) == (8, 6, 5)
    assert not any("times" in line for line in plan.remarks), "the run reads it"


class Numbered(nn.Module):
    """A block that knows its number, which is by chance the width of the fifth."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.hidden = number, 4
        self.up, self.down = nn.Linear(7, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


def test_the_number_of_a_block_is_no_size() -> None:
    model = nn.Sequential(*(Numbered(k) for k in range(6))).eval()
    plan = pr.plan(model, torch.randn(2, 7), RECIPE, target=pr.Sparsity(0.25))
    small: Any = pr.shrink(model, plan)
    assert [block.number for block in small] == list(range(6))
    assert [block.hidden for block in small] == [block.up.out_features for block in small] == [3] * 6


@pytest.mark.parametrize("broken", [True, False])
def test_an_integer_that_the_run_reads_otherwise_is_left_alone(broken: bool) -> None:
    class Counted(Several):
        def forward(self, x: Tensor) -> Tensor:
            if broken:
                x = sum(x for _ in range(self.width)) / self.width  # type: ignore[assignment]
            return super().forward(x)

    plan = pr.plan(Counted().eval(), torch.randn(2, 6), RECIPE, target=pr.Sparsity(0.25))
    assert plan.attributes == ({} if broken else {("", "width"): 12})
