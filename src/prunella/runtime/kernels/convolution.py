"""Convolutions by the compiled kernels: sizes are looked at once for all images of a shape."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import FEW, Activation, Packed

_MOST = 1 << 30
"""Of strides and the like: larger ones would not fit the 32 bits that the kernels are given."""


def conv2d(
    packed: Packed,
    x: Tensor,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = Activation.NONE,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    strict: bool = False,
) -> Tensor | None:
    """`activation(conv(x, W) + bias + residual)`: x (B, C, H, W), W packed as (O, C kh kw); y has the format of x.

    None, if strict, where a patch of x is not finite, or would not be in bfloat16. Errors: RequestError for sizes.
    """
    x = native.as_float32(x)
    made = patches(packed.shape, x.shape, is_last(x), kernel, stride, padding, dilation)
    y = torch.empty(made.out, device="meta")
    bias, residual = native.extras(packed, y, bias, residual, made.layout)
    return run_patches(packed, made, x, bias, residual, activation, strict=strict)


@dataclass(frozen=True)
class Patches:
    """The sizes of a convolution and its image, as the kernels take them: found once for all calls of one shape."""

    out: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    layout: torch.memory_format
    image: Any = field(repr=False)

    @property
    def positions(self) -> int:
        """Of all outputs of one channel."""
        return self.out[0] * self.out[2] * self.out[3]


def patches(
    weight: tuple[int, int],
    x: Sequence[int],
    last: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Patches:
    """For a weight `(O, C kh kw)` and x `(B, C, H, W)`. Errors: RequestError for sizes that do not fit or are odd."""
    if len(x) != 4 or x[1] * kernel[0] * kernel[1] != weight[1]:
        what = f"x {tuple(x)} with a kernel {kernel} does not fit a weight of {weight[1]} columns"
        raise RequestError(what, "", "x is (B, C, H, W) and the weight (O, C kh kw)")
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0 or max(*kernel, *stride, *padding, *dilation) > _MOST:
        what = f"stride {stride}, padding {padding}, dilation {dilation} or kernel {kernel} is out of range"
        raise RequestError(what, f"the kernels count from 1 to {_MOST}, padding from 0", "")
    batch, channels, height, width = x
    sides = zip((height, width), kernel, stride, padding, dilation, strict=True)
    high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    if min(high, wide) < 1:
        raise RequestError(f"x {tuple(x)} is smaller than the kernel {kernel}", "", "")
    image = native.ImageSizes(channels, height, width, batch, *kernel, *stride, *padding, *dilation, int(last))
    layout, rows, plane = torch.channels_last if last else torch.contiguous_format, weight[0], high * wide
    strides = (rows * plane, 1, rows * wide, rows) if last else (rows * plane, plane, wide, 1)
    return Patches((batch, rows, high, wide), strides, layout, ctypes.pointer(image))


def run_patches(
    packed: Packed,
    made: Patches,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    *,
    strict: bool = True,
) -> Tensor | None:
    """`conv2d`, strict, with little around the kernel: all float32 on the CPU, bias and residual of the right shape."""
    if packed.config.kind in FEW:
        raise NotSupported(f"no convolution runs on {packed.config.kind.value}", "it is for a few tokens", "")
    x = x.contiguous(memory_format=made.layout)
    y = x.new_empty_strided(made.out, made.strides)  # quicker than naming a memory format
    residual = None if residual is None else residual.contiguous(memory_format=made.layout)
    done = native.entries()[2](
        packed.handle,
        made.image,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        native.NUMBERS[activation],
        strict,
        packed.config.tile,
        torch.get_num_threads(),
        y.data_ptr(),
    )
    if done == native.ODD_INPUT:
        return None
    if done:
        native.check_code(done)
    return y


def is_last(x: Tensor) -> bool:
    """Whether the channels of an image are its last axis in memory, and it could not be said to have them first."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
