"""Two layers with an operation between them: the smallest network on which an operation can be pruned wrongly."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.graph.data import Graph

Between = Callable[[nn.Module, Tensor], Tensor]
WIDTH = 12
SHAPE = (2, 3, 8, 8)


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


def half(graph: Graph) -> dict[str, Tensor]:
    """Keep every second unit of each group."""
    return {g.name: torch.arange(g.size) % 2 == 0 for g in graph.groups}


def picture(graph: Graph) -> str:
    """A graph as text, arrays included, to compare two of them."""
    members = [(g.name, g.size, g.kind, m.entity, m.axis, m.role, m.index.tolist(), m.unit.tolist())
               for g in graph.groups for m in g.members]  # fmt: skip
    sizes = {name: [e.size(half(graph)) for e in extents] for name, extents in graph.extents.items()}
    return repr((members, graph.frozen, graph.layers, sizes, graph.macs(half(graph)), graph.uncounted, graph.unused))
