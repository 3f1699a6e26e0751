"""What experts and fused projections do: products by groups of tokens, interleaved halves, sizes that are products."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import check_exact, frozen_because, produced_by, settle
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple


class Experts(nn.Module):
    """Sorted tokens go to three experts; `gate` and `up` are interleaved columns of one weight, as in gpt-oss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 12, 2 * width))
        self.second = nn.Parameter(torch.randn(3, width, 12))
        self.register_buffer("ends", torch.tensor([2, 2, 6], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.nn.functional.grouped_mm(x, self.first, offs=self.ends)
        inner = both[:, ::2].sigmoid() * both[:, 1::2]
        return torch.nn.functional.grouped_mm(inner, self.second, offs=self.ends)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_experts_lose_neurons_in_the_multiples_that_the_kernel_takes() -> None:
    torch.manual_seed(0)
    model, x = settle(Experts(16)), torch.randn(6, 12)
    group = produced_by(couple(model, x), "first")
    assert (group.size, group.multiple) == (16, 4)  # 16 bytes a row in float32
    plan = pr.plan(model, x, pr.Recipe(pr.criteria.random), target=pr.Sparsity(0.3))
    assert [row.kept for row in plan.rows] == [8]
    small = pr.shrink(model, plan)  # compared in float64 with the masked model
    assert small.first.shape == (3, 12, 16) and small.second.shape == (3, 8, 12)
    kept = plan.keep[group.name].nonzero().flatten()
    assert torch.equal(small.first, model.first[:, :, torch.stack([2 * kept, 2 * kept + 1], 1).flatten()])


class Interleaved(nn.Module):
    """Every `step`-th position from `start`: halves of a product for (0, 2) and (1, 2)."""

    def __init__(self, *, start: int = 1, width: int = 12) -> None:
        super().__init__()
        self.start = slice(start, None, 2)
        self.a, self.b = nn.Linear(5, width), nn.Linear(len(range(start, width, 2)), 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.a(x)
        halves = both[:, self.start] * both[:, ::2][:, : self.b.in_features]
        out: Tensor = self.b(halves)
        return out


def test_interleaved_halves_go_in_pairs() -> None:
    torch.manual_seed(0)
    checked = check_exact(Interleaved(), torch.randn(4, 5))
    assert produced_by(checked.graph, "a").size == 6


def test_a_step_that_does_not_divide_the_axis_freezes_it() -> None:
    graph = couple(Interleaved(width=11), torch.randn(4, 5))
    assert frozen_because(graph, "a.weight", 0, "sliced with a step") and not graph.groups


class Fused(nn.Module):
    """One projection for queries, keys and values, split by sizes that are products of attributes, as in DBRX."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.heads, self.head_dim = 12, 3, 4
        self.qkv, self.out = nn.Linear(10, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        inner = self.heads * self.head_dim
        parts = self.qkv(x).split([self.size, inner, inner], dim=2)
        q, k, v = (part.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for part in parts)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


def test_a_size_that_is_a_product_follows_by_the_factor_that_is_free() -> None:
    torch.manual_seed(0)
    checked = check_exact(Fused(), torch.randn(2, 5, 10))
    assert produced_by(checked.graph, "qkv").size == 3
    solved = {a.name: a.new(checked.keep) for a in checked.graph.attributes}
    assert solved == {"size": 8, "heads": 2}
