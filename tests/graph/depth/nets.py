"""Small networks with and without residual blocks, and the bypass that a shallower one must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Two heads; `number` is what a cache would know the layer by."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.number, self.heads, self.size = number, 2, width // 2
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        form = (*x.shape[:2], self.heads, self.size)
        q, k, v = (f(x).view(form).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class RMS(nn.Module):
    """The norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """Attention and two linear maps around norms: before them, or after the sum."""

    def __init__(self, width: int, number: int, post: bool = False, norm: Callable[[int], nn.Module] = RMS) -> None:
        super().__init__()
        self.post, self.norm1, self.norm2 = post, norm(width), norm(width)
        self.attention = Attention(width, number)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """Layers in a list called `xyz`. count: the forward pass counts to `quantity`; rates: one number a layer."""

    def __init__(self, depth: int = 4, *, post: bool = False, count: bool = False, norm: Any = RMS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.xyz = nn.ModuleList([Layer(8, k + 5, post, norm) for k in range(depth)])
        self.head = nn.Linear(8, 3)
        self.count, self.quantity, self.unrelated = count, depth, depth
        self.rates = [0.1 * k for k in range(depth)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for k in range(self.quantity) if self.count else range(len(self.xyz)):
            x = self.xyz[k](x)
        return self.head(x)


class Wrap(nn.Module):
    """A list of any modules between two maps, each called `times` times with its own output."""

    def __init__(self, make: Callable[[int], nn.Module], depth: int = 3, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.times = nn.Linear(6, 8), nn.Linear(8, 3), times
        self.parts = nn.Sequential(*[make(k) for k in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.times):
            x = self.parts(x)
        return self.head(x)


class Calls(nn.Module):
    """One linear map and a formula: what `rule(x, f)` gives."""

    def __init__(self, rule: Callable[[Tensor, nn.Module], Tensor], width: int = 8) -> None:
        super().__init__()
        self.f, self.rule = nn.Linear(width, width), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.f)


class Basic(nn.Module):
    """ResNet's block; a projection on the shortcut where the width or the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        change = inputs != outputs or stride > 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if change else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """Two stages of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Basic(8, 8, 1), Basic(8, 8, 1), Basic(8, 8, 1))
        self.stage2 = nn.Sequential(Basic(8, 12, 2), Basic(12, 12, 1), Basic(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class NextBlock(nn.Module):
    """ConvNeXt's: depthwise convolution, channels last, layer norm, two maps, a scale, and the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Stages in a list of their own, the first without down-sampling: it is as a whole a sum with its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 2, 2)
        second = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.Sequential(NextBlock(12), NextBlock(12)))
        self.stages = nn.Sequential(nn.Sequential(NextBlock(8), NextBlock(8), NextBlock(8)), second)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet's layer: its input and what it adds, side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.f = nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.f(x))], -1)


class DenseNet(nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Dense(6), Dense(10), Dense(14))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts(x))


class Lender(nn.Module):
    """The first layer makes a bias that all later ones add: it cannot go, they can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([Borrowing(k == 0) for k in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for part in self.parts:
            x, bias = part(x, bias)
        return x


class Borrowing(nn.Module):
    """`x + f(x) + bias`, and the bias."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6) if first else None

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is None:
            bias = torch.zeros(6) if self.table is None else self.table(torch.arange(6)).sum(0)
        return x + self.f(x) * bias, bias


def bypass(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy in which these modules return their first argument; of a tuple the rest stays."""
    replica = copy.deepcopy(model)
    for path in paths:
        block = replica.get_submodule(path)
        block.forward = _given(block.forward)  # type: ignore[method-assign]
    return replica


def _given(forward: Callable[..., Any]) -> Callable[..., Any]:
    def shorter(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(x.clone(), *args, **kwargs)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return shorter


TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
