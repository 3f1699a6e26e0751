"""Two layers with an operation between them: the smallest network on which an operation can be pruned wrongly."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Between = Callable[[nn.Module, Tensor], Tensor]
WIDTH = 12


class Flat(nn.Module):
    """`last(op(relu(first(x))))` on vectors; `op` sees the module, so that it can read attributes."""

    def __init__(self, op: Between, width: int = WIDTH) -> None:
        super().__init__()
        self.op, self.width, self.half, self.third = op, width, width // 2, width // 3
        self.two, self.pair, self.three, self.four = 2, 2, 3, 4
        self.first = nn.Linear(6, width)
        self.table = nn.Parameter(torch.randn(width))
        self.square = nn.Parameter(torch.randn(width, width) / 3)
        self.long = nn.Parameter(torch.randn(width + 8))
        self.register_buffer("constant", torch.randn(width))
        with torch.no_grad():
            size = op(self, F.relu(self.first(self.example()))).shape[-1]
        self.last = nn.Linear(size, 4)

    @staticmethod
    def example() -> Tensor:
        """Three vectors."""
        return torch.randn(3, 6, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self, F.relu(self.first(x))))


class Image(nn.Module):
    """The same on maps, with 1x1 convolutions before and after."""

    def __init__(self, op: Between, width: int = WIDTH) -> None:
        super().__init__()
        self.op, self.width, self.half, self.pair, self.norms = op, width, width // 2, 2, 2
        self.first = nn.Conv2d(3, width, 1)
        with torch.no_grad():
            size = op(self, F.relu(self.first(self.example()))).shape[1]
        self.last = nn.Conv2d(size, 4, 1)

    @staticmethod
    def example() -> Tensor:
        """Two maps of 4x4."""
        return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self, F.relu(self.first(x))))
