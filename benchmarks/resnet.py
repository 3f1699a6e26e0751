"""ResNet for 32x32 images (He et al. 2015, section 4.2) with shortcut A: stride-2 subsampling and zero channels.

The shortcut has no parameters, so the channels of a stage sit in the middle of the next stage's channels: a good test
of who follows channels through slices and padding.
"""

from __future__ import annotations

from typing import cast

from images import data_folder
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, (wide_out - wide_in) // 2
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return relu(x + y)


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks, 16, 32 and 64 channels wide; depth is 6 * blocks + 2."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.linear(x.mean((2, 3))))


def _stage(wide_in: int, wide_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(wide_in, wide_out, stride)
    return nn.Sequential(first, *(Block(wide_out, wide_out, 1) for _ in range(blocks - 1)))


def weights_name(depth: int) -> str:
    """The file with the weights tuned on the JPEG images."""
    return f"cifar10_resnet{depth}_jpeg.safetensors"


def pretrained(depth: int) -> CifarResNet:
    """The network of that depth with its trained weights, in eval mode."""
    model = CifarResNet((depth - 2) // 6)
    model.load_state_dict(load_file(data_folder() / weights_name(depth)))
    return model.eval()
