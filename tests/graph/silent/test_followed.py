"""Operations along other axes, and sizes that a cache would mix up."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.graph.silent.test_outputs import pruned
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple


class Between(nn.Module):
    """3 -> 16, `between`, -> 3."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(3, 16), nn.Linear(16, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[no-any-return]


X = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([0, 1, 1, 0])
FREE = {
    "roll": lambda h: torch.roll(h, (-1, 1), (1, 2)),
    "index_add": lambda h: torch.zeros_like(h).index_add_(1, INDEX, h) + h,
    "index_copy": lambda h: torch.zeros_like(h).index_copy(2, INDEX.unique(), h[:, :, :2]) + h,
}
FIXED = {
    "roll of units": lambda h: torch.roll(h, 1, -1),
    "roll of all": lambda h: torch.roll(h, 3),
    "index_add of units": lambda h: torch.zeros_like(h).index_add(3, torch.arange(16), h),
}


@pytest.mark.parametrize("name", FREE)
def test_units_pass_through(name: str) -> None:
    plan, _ = pruned(Between(FREE[name]), X)
    assert {row.name for row in plan.rows} == {"a"}


@pytest.mark.parametrize("name", FIXED)
def test_units_that_move_stay(name: str) -> None:
    graph = couple(Between(FIXED[name]), X)
    assert graph.groups == ()
    assert name.split(" ")[0] in next(f.reason for f in graph.frozen if f.entity == "a.weight")


@functools.lru_cache(16)
def head_sizes(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (shape[0], shape[1], heads, shape[2] // heads)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.reshape(head_sizes(tuple(part.shape), self.heads)).transpose(1, 2) for part in parts)
        return x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_cache_does_not_mix_up_sizes() -> None:
    model, x = nn.Sequential(Attention(), Attention(), nn.Linear(16, 3)), torch.randn(2, 5, 16)
    head_sizes.cache_clear()
    model(x)
    before = head_sizes.cache_info().currsize
    graph = couple(model, x)
    assert [(group.name, group.kind, group.size) for group in graph.groups] == [
        ("0.qkv", "head", 4),
        ("1.qkv", "head", 4),
    ]
    assert head_sizes.cache_info().currsize == before, "no tracked size is left in it"
    plan = pr.plan(model, x, pr.Recipe(pr.criteria.random, pr.Head(), pr.uniform), target=pr.Sparsity(0.5))
    assert pr.shrink(model, plan)(x).shape == (2, 5, 3)
