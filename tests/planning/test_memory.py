"""What planning holds beside the model: a multiple of its weights that does not grow with their number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import prunella as pr
from prunella.llm.streaming.memory import Live


class Block(nn.Module):
    """A residual block with a `train` of its own, as the models of transformers have one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(torch.relu(self.up(x)))
        return x + added

    def train(self, mode: bool = True) -> Block:
        super().train(mode)
        return self


class Blocks(nn.Sequential):
    """Blocks, under a `train` once more."""

    def train(self, mode: bool = True) -> Blocks:
        super().train(mode)
        return self


def test_planning_takes_four_times_the_weights() -> None:
    torch.manual_seed(0)
    model = Blocks(*(Block(96) for _ in range(4)))
    size = sum(p.numel() * 4 for p in model.parameters())
    data = [torch.randn(2, 96) for _ in range(2)]
    recipe = pr.Recipe(pr.criteria.fluctuation, equal_widths=True)
    with Live() as live:
        plan = pr.plan(model, data[0], recipe, target=pr.Sparsity(0.2), data=data)
    assert plan.changes.cuts
    # values to restore, the smaller model, and the masked one in float64 beside a part of it in float32
    assert live.peak < 4.3 * size
