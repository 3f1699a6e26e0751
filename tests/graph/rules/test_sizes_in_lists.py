"""Sizes in lists and tuples of a module: they follow a cut, entry by entry, and a run leaves the containers alone."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracle import check_exact
from torch import Tensor, nn

import prunella as pr
from prunella.io.plan_file import load_plan, save_plan

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Parts(nn.Module):
    """A layer whose outputs are split by a list, and heads whose number and size are in another one."""

    def __init__(self, parts: Any, heads: Any) -> None:
        super().__init__()
        self.parts, self.heads = parts, heads
        self.first, self.heads_of = nn.Linear(6, sum(parts)), nn.Linear(6, heads[0] * heads[1])
        self.readers = nn.ModuleList(nn.Linear(size, 3) for size in parts)
        self.out = nn.Linear(heads[0] * heads[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.first(x).relu().split(self.parts, dim=-1)
        q = self.heads_of(x).view(len(x), self.heads[0], 1, self.heads[1])
        mixed = (q @ q.mT).sigmoid() @ q
        total: Tensor = self.out(mixed.flatten(1))
        for reader, piece in zip(self.readers, pieces, strict=True):
            total = total + reader(piece)
        return total


@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(2, 9), min_size=2, max_size=4), st.integers(2, 5), st.integers(2, 4), st.booleans())
def test_sizes_in_lists_follow(parts: list[int], heads: int, size: int, tuples: bool) -> None:
    torch.manual_seed(0)
    kind = tuple if tuples else list
    model = Parts(kind(parts), kind([heads, size]))
    held = model.parts, model.heads
    checked = check_exact(model, X, count=False)
    assert model.parts is held[0] and model.heads is held[1] and type(model.parts[0]) is int
    small: Any = checked.small
    assert type(small.parts) is kind and sum(small.parts) == small.first.out_features < sum(parts)
    assert {group.size for group in checked.graph.groups if group.kind == "head"} == {heads}
    assert small.heads[0] < heads and small.heads[1] == size


def test_a_plan_keeps_the_lists(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Parts([4, 8], [2, 3])
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform), target=pr.Params(0.8))
    save_plan(plan, tmp_path / "a.plan")
    small: Any = pr.shrink(model, load_plan(tmp_path / "a.plan"))
    assert small.parts == [small.readers[0].in_features, small.readers[1].in_features] != [4, 8]


class Kernels(nn.Module):
    """A list of numbers that are no sizes of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.a, self.b = [2, 3], nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(nn.functional.avg_pool2d(self.a(x), self.window))
        return out


def test_a_list_of_other_numbers_stays() -> None:
    torch.manual_seed(0)
    checked = check_exact(Kernels(), torch.randn(1, 3, 6, 6))
    small: Any = checked.small
    assert small.window == [2, 3] and [group.size for group in checked.graph.groups] == [6]
