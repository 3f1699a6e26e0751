"""Small models for the tests of methods, and a graph written by hand: an oracle that needs no engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from prunella.graph.data import Cost, Entity, Extent, Graph, Group, Layer, Member


def mlp(width: int = 6, seed: int = 0) -> nn.Sequential:
    """4 -> width -> 5 -> 3 with ReLU and biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3))


def convnet(seed: int = 0) -> nn.Sequential:
    """Convolution, batch norm with random scales, convolution, flatten, linear."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


class Residual(nn.Module):
    """`x + scale * relu(conv(x))`, shape kept."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(width, width, 3, padding=1), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.relu(self.conv(x))


def blocks(scales: tuple[float, ...] = (1.0, 0.5, 0.25), seed: int = 0) -> nn.Sequential:
    """Residual blocks on images of 3 channels, then a linear layer on the mean."""
    torch.manual_seed(seed)
    stack = nn.Sequential(*(Residual(3, scale) for scale in scales))
    return nn.Sequential(stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))


IMAGE = (2, 3, 8, 8)


def images(batches: int = 3, seed: int = 0) -> list[Tensor]:
    """Random images for `convnet`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(IMAGE, generator=generator) for _ in range(batches)]


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient no unit escapes."""
    return (model(batch) - 1).square().mean()


class Attention(nn.Module):
    """Self-attention with separate projections and biases, then a readout."""

    def __init__(self, heads: int = 4, size: int = 3, width: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1) @ v
        if self.gate is not None:
            mixed = mixed * self.gate.view(-1, 1, 1)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def hand_graph(width: int = 6) -> Graph:
    """The graph of `mlp(width)` on a batch of 2, written down."""
    shapes = {"0.weight": (width, 4), "0.bias": (width,), "2.weight": (5, width), "2.bias": (5,), "4.weight": (3, 5)}
    shapes["4.bias"] = (3,)
    entities = {n: Entity(n, (n,), s, 4, True, True) for n, s in shapes.items()}
    first, second = _chain("0", "2", width), _chain("2", "4", 5)
    sizes = {4: Extent(4), width: _of("0", width), 5: _of("2", 5), 3: Extent(3)}
    layers = tuple(
        Layer(n, f"{n}.weight", 0, 1, 1, "linear", f"{n}.bias", n, 2.0 * np.prod(shapes[f"{n}.weight"])) for n in "024"
    )
    costs = tuple(
        Cost("addmm", n, n, 2.0, tuple(sizes[size] for size in shapes[f"{n}.weight"])) for n in ("0", "2", "4")
    )
    extents = {n: tuple(sizes[size] for size in s) for n, s in shapes.items()}
    return Graph(entities, (first, second), (), layers, costs, extents)


def _chain(maker: str, reader: str, size: int) -> Group:
    places = np.arange(size)
    members = (
        Member(f"{maker}.weight", 0, places, places, "out"),
        Member(f"{maker}.bias", 0, places, places, "bias"),
        Member(f"{reader}.weight", 1, places, places, "in"),
    )
    return Group(maker, size, "channel", members)


def _of(group: str, size: int) -> Extent:
    return Extent(0, ((group, np.ones(size, dtype=np.int64)),))
