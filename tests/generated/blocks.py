"""The words of a random network: blocks over a vector (b, c), a sequence (b, t, c) or a map (b, c, h, w).

`axis` is where the channels are: 1 for vectors and maps, 2 for sequences. Sizes are attributes or read from shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.odd import Attention as Attention

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def mix(inputs: int, outputs: int, axis: int, dims: int) -> nn.Module:
    """A layer that mixes channels: linear, or a 1x1 convolution on maps."""
    return nn.Conv2d(inputs, outputs, 1) if dims == 4 else nn.Linear(inputs, outputs)


class Act(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class Linear(nn.Linear):
    pass


class Conv(nn.Module):
    """3x3 or 1x1, strided, grouped; depthwise when groups equals the inputs."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Transposed convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class LastLinear(nn.Module):
    """A linear layer on a map by permutation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Einsum(nn.Module):
    """A linear layer by einsum, with the weight (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...c,cd->...d", x, self.kernel)


class Norm(nn.Module):
    """Batch, instance, group, layer or RMS norm."""

    def __init__(self, name: str, width: int, dims: int, groups: int) -> None:
        super().__init__()
        made = {
            "batch": lambda: nn.BatchNorm2d(width) if dims == 4 else nn.BatchNorm1d(width),
            "instance": lambda: nn.InstanceNorm2d(width, affine=True),
            "group": lambda: nn.GroupNorm(groups, width),
            "layer": lambda: nn.LayerNorm(width),
            "rms": lambda: nn.RMSNorm(width),
        }
        self.norm = made[name]()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class SqueezeGate(nn.Module):
    """Channels of a map gated by a small network of their means."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """`x + down(relu(up(x)))`."""

    def __init__(self, width: int, hidden: int, axis: int, dims: int) -> None:
        super().__init__()
        self.up, self.down = mix(width, hidden, axis, dims), mix(hidden, width, axis, dims)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Halves(nn.Module):
    """Chunk, work on one half, concatenate."""

    def __init__(self, width: int, axis: int, dims: int) -> None:
        super().__init__()
        self.axis, self.work = axis, mix(width // 2, width // 2, axis, dims)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=self.axis)
        return torch.cat([right, F.relu(self.work(left))], dim=self.axis)


class Split(nn.Module):
    """Split in recorded, unequal parts, each with its own layer; the parts are added."""

    def __init__(self, width: int, first: int, outputs: int, axis: int, dims: int) -> None:
        super().__init__()
        self.axis, self.sizes = axis, [first, width - first]
        self.left, self.right = mix(first, outputs, axis, dims), mix(width - first, outputs, axis, dims)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(self.sizes, dim=self.axis)
        return self.left(left) + self.right(right)


class Glu(nn.Module):
    """Values times gates, from the two halves."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, self.axis)
        return value * torch.sigmoid(gate)


class Shuffle(nn.Module):
    """ShuffleNet's interleaving of channel groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *rest = x.shape
        return (
            x.view(batch, self.groups, channels // self.groups, *rest).transpose(1, 2).reshape(batch, channels, *rest)
        )


class Pixel(nn.Module):
    """Sub-pixel up or down."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2) if self.up else F.pixel_unshuffle(x, 2)


class Pool(nn.Module):
    """Spatial pooling or interpolation by two."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "up":
            return F.interpolate(x, scale_factor=2.0)
        return F.max_pool2d(x, 2) if self.name == "max" else F.avg_pool2d(x, 2)


class ToVector(nn.Module):
    """A map by flattening or by its mean, a sequence by its mean, its flattening or its first token."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "flatten":
            return torch.flatten(x, 1)
        if x.dim() == 4:
            return x.mean((2, 3)) if self.name == "mean" else x.amax((2, 3))
        return x.mean(1) if self.name == "mean" else x[:, 0]


class ToSequence(nn.Module):
    """Tokens from a map, or a vector folded in `parts`, or repeated."""

    def __init__(self, name: str, parts: int) -> None:
        super().__init__()
        self.name, self.parts = name, parts

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.flatten(2).transpose(1, 2)
        if self.name == "fold":
            return x.view(x.shape[0], self.parts, -1)
        return x.unsqueeze(1).expand(-1, self.parts, -1)


class Tied(nn.Module):
    """There and back by one weight."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.weight)), self.weight.t())


class Shared(nn.Module):
    """The same layer twice."""

    def __init__(self, width: int, axis: int, dims: int) -> None:
        super().__init__()
        self.layer = mix(width, width, axis, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class PerChannel(nn.Module):
    """One number per channel: a scale (parameter) and a shift (buffer)."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        shape = (width, 1, 1) if dims == 4 else (width,)
        self.scale = nn.Parameter(torch.rand(shape) + 0.5)
        self.register_buffer("shift", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Reorder(nn.Module):
    """Flip, a constant gather, doubling by repeat or repeat_interleave, or zero channels added."""

    def __init__(self, name: str, axis: int, width: int) -> None:
        super().__init__()
        self.name, self.axis = name, axis
        self.register_buffer("order", torch.arange(width).flip(0).roll(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "flip":
            return x.flip(self.axis)
        if self.name == "gather":
            return x.index_select(self.axis, self.order)
        if self.name == "interleave":
            return x.repeat_interleave(2, dim=self.axis)
        if self.name == "repeat":
            return torch.cat([x, x * 0.5], dim=self.axis)
        pad = [1, 2] if x.dim() == 3 or x.dim() == 2 else [0, 0, 0, 0, 1, 2]
        return F.pad(x, pad)


class Slice(nn.Module):
    """The first channels, with the bound as an attribute."""

    def __init__(self, axis: int, bound: int) -> None:
        super().__init__()
        self.axis, self.bound = axis, bound

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, 0, self.bound)


class Across(nn.Module):
    """Operations that let channels see one another without a weight: the axis must freeze, or be exact."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__()
        self.name, self.axis = name, axis

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "cumsum":
            return x.cumsum(self.axis)
        if self.name == "sort":
            return x.sort(dim=self.axis).values
        if self.name == "fft":
            return torch.fft.fft(x, dim=self.axis).real
        if self.name == "softmax":
            return x.softmax(self.axis)
        if self.name == "mean":
            return x * torch.sigmoid(x.mean(self.axis, keepdim=True))
        if self.name == "max":
            return x - x.amax(self.axis, keepdim=True)
        return F.normalize(x, dim=self.axis)


class Join(nn.Module):
    """Two values added, multiplied, compared or concatenated."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__()
        self.name, self.axis = name, axis

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.name == "cat":
            return torch.cat([x, y], dim=self.axis)
        if self.name == "where":
            return torch.where(x > 0, x, y)
        return x + y if self.name == "add" else x * torch.tanh(y)


class Outer(nn.Module):
    """All products of the channels of two vectors: a unit of each side meets all of the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1)


class Gate(nn.Module):
    """A map or a sequence gated by a vector of the same channels."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gate = torch.sigmoid(y)
        return x * (gate[:, :, None, None] if x.dim() == 4 else gate.unsqueeze(1))
