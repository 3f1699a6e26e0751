"""Channels and filters: what is left has the size of the formula, and what is coupled goes together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import prunella as pr


def test_a_cut_convolution_has_the_parameters_and_multiply_adds_of_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    plan = pr.plan(model, x, pr.Recipe(pr.magnitude, pr.Channel()), target=pr.Sparsity(0.5))
    small = pr.shrink(model, plan)
    masked = pr.apply_(model, plan)
    a, b = (int(plan.keep[name].sum()) for name in ("0", "3"))
    assert (a, b) == (4, 3)
    params = a * (3 * 9 + 1) + 2 * a + b * (a * 9 + 1) + 5 * (b + 1)
    macs = 2 * (a * 3 * 9 * 81 + b * a * 9 * 16 + 5 * b)
    assert sum(p.numel() for p in small.parameters()) == params == plan.after.params
    assert plan.after.macs == macs
    with torch.no_grad():
        assert torch.allclose(small(x), masked(x), atol=1e-5)


class Residual(nn.Module):
    """Two convolutions that write one stream, and one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.back = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.head(x + self.back(torch.relu(self.inner(x))))
        return out


def test_filters_on_one_stream_share_one_index_set() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(1, 1, 5, 5)
    plan = pr.plan(model, x, pr.Recipe(pr.magnitude, pr.Channel()), target=pr.Sparsity(0.5))
    kept = plan.cuts["first.weight"][0]
    assert plan.cuts["back.weight"][0].equal(kept) and plan.cuts["back.bias"][0].equal(kept)
    assert plan.cuts["inner.weight"][1].equal(kept) and plan.cuts["head.weight"][1].equal(kept)
    scores = sum(getattr(model, name).weight.detach().abs().flatten(1).sum(1) for name in ("first", "back"))
    assert kept.tolist() == sorted(scores.topk(3).indices.tolist())
