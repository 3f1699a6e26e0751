"""Small convolutional networks in our own words, one per family, each with the couplings that make the family hard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (over the stride), batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class VGG(nn.Module):
    """Plain stack; flatten of a 2x2 map into a linear layer, so that one channel is four columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc1 = nn.Linear(12 * 4, 10)
        self.fc2 = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


class Basic(nn.Module):
    """ResNet's basic block; `shortcut` is a convolution or option A: every second pixel, padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, option_a: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        self.stride, self.more, self.option_a = stride, outputs - inputs, option_a
        if self.more and not option_a:
            self.shortcut = conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.more and self.option_a:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        elif self.more:
            x = self.shortcut(x)
        return F.relu(x + y)


class ResNet(nn.Module):
    """Two stages of basic blocks; the stem and all blocks of a stage share one set of channels."""

    def __init__(self, option_a: bool = False) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block1, self.block2 = Basic(8, 8, 1, option_a), Basic(8, 12, 2, option_a)
        self.block3 = Basic(12, 12, 1, option_a)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(F.relu(self.stem(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1 with a projected shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.conv = conv_bn(inputs, width, 1), conv_bn(width, width, 3, 1, groups)
        self.expand = conv_bn(width, outputs, 1)
        self.shortcut = conv_bn(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(F.relu(self.conv(F.relu(self.reduce(x)))))
        return F.relu(y + self.shortcut(x))


class BottleneckNet(nn.Module):
    """Two bottlenecks between a stem and a head; `groups` makes it a ResNeXt."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block1, self.block2 = Bottleneck(8, 12, 16, groups), Bottleneck(16, 12, 16, groups)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Each layer reads the concatenation of all before it; norm before convolution."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = [8 + growth * i for i in range(3)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)
        self.norm = nn.BatchNorm2d(8 + 3 * growth)
        self.fc = nn.Linear(8 + 3 * growth, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's inverted residual: expand, depthwise, project."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_bn(width, hidden, 1), conv_bn(hidden, hidden, 3, 1, hidden)
        self.project = conv_bn(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class MobileNet(nn.Module):
    """A stem, two inverted residuals, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.block1, self.block2 = Inverted(8, 16), Inverted(8, 24)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu6(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass, half are convolved, then the two halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.first, self.depthwise = conv_bn(half, half, 1), conv_bn(half, half, 3, 1, half)
        self.last = conv_bn(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.last(self.depthwise(F.relu(self.first(right)))))
        out = torch.cat((left, right), dim=1)
        batch, channels, height, width = out.shape
        out = out.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return out.reshape(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """Two units, so that halves meet crosswise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.unit1, self.unit2 = ShuffleUnit(16), ShuffleUnit(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.unit2(self.unit1(F.relu(self.stem(x)))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A convolution whose channels are gated by a small network of their means; the gate by `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 12), nn.Conv2d(12, 10, 3, padding=1)
        self.down, self.up = nn.Linear(12, 6), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        batch, channels = x.shape[:2]
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(batch, channels)))))
        return self.conv(x * gate.view(batch, channels, 1, 1))


class UNet(nn.Module):
    """Down, up by a transposed convolution, concatenation with the skip, interpolation for the second skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, 2)
        self.mix2 = conv_bn(24, 12)
        self.mix1 = conv_bn(12 + 8, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        three = F.relu(self.down3(F.max_pool2d(two, 2)))
        two = F.relu(self.mix2(torch.cat([self.up2(three), two], 1)))
        up = F.interpolate(two, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(F.relu(self.mix1(torch.cat([up, one], 1))))


class GroupNormNet(nn.Module):
    """Group norm: its statistics mix the channels of one group, so that only whole groups can go; and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.conv2, self.norm2 = nn.Conv2d(12, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.conv3 = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv3(F.relu(self.norm2(self.conv2(x))))


class Inception(nn.Module):
    """Parallel branches of different kernels and a pooled one, concatenated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.one, self.three = conv_bn(8, 4, 1), nn.Sequential(conv_bn(8, 6, 1), nn.ReLU(), conv_bn(6, 8, 3))
        self.pooled = conv_bn(8, 4, 1)
        self.mix = conv_bn(16, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branches = [self.one(x), self.three(x), self.pooled(F.avg_pool2d(x, 3, 1, 1))]
        x = F.relu(self.mix(F.relu(torch.cat(branches, 1))))
        return self.fc(x.amax((2, 3)))


class Waves(nn.Module):
    """One-dimensional: dilated and strided convolutions, a transposed one with groups of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 8, 5, padding=4, dilation=2), nn.Conv1d(8, 12, 3, stride=2)
        self.up = nn.ConvTranspose1d(12, 12, 4, stride=2, groups=12)
        self.out = nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(F.gelu(self.conv2(F.gelu(self.conv1(x)))))))


class Multiplier(nn.Module):
    """A depthwise convolution with two outputs for every input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.depthwise = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=6)
        self.norm, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.depthwise(F.relu(self.conv1(x))))))


class PixelShuffle(nn.Module):
    """Sub-pixel upsampling: four channels of the first convolution become one channel of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 24, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.pixel_shuffle(self.conv1(x), 2)))
        return self.conv3(F.pixel_unshuffle(x, 2))


class ChannelsLast(nn.Module):
    """ConvNeXt's way: depthwise, then linear layers over a permuted map, scaled, permuted back and added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.narrow = nn.Linear(8, 20), nn.Linear(20, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(self.depthwise(x).permute(0, 2, 3, 1))))
        return self.out(x + (self.scale * y).permute(0, 3, 1, 2))
