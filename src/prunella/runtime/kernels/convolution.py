"""Convolutions by the compiled kernels. The sizes are checked once for all images of one shape."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.runtime.kernels import library, signatures
from prunella.runtime.kernels.config import ACTIVATION_CODES, MANY_CODES, Activation
from prunella.runtime.kernels.library import PackedWeight

_LARGEST = 1 << 30
"""The largest stride, padding, dilation or kernel: the C interface passes them in 32 bits."""


def conv2d(
    packed: PackedWeight,
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
    """`activation(conv(x, W) + bias + residual)`: x (B, C, H, W), W packed as (O, C kh kw); y has the layout of x.

    strict: None where a patch of x holds NaN or infinity, or a number that is infinite in bfloat16. Errors:
    RequestError for sizes that do not fit.
    """
    x = library.as_float32(x)
    sizes = patches(packed.shape, x.shape, is_channels_last(x), kernel, stride, padding, dilation)
    y = torch.empty(sizes.out, device="meta")
    bias, residual = library.checked_addends(packed, y, bias, residual, sizes.layout)
    return run_patches(packed, sizes, x, bias, residual, activation, strict=strict)


@dataclass(frozen=True)
class Patches:
    """The sizes of a convolution, and its image as the kernels take it: the same for all inputs of one shape."""

    out: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    layout: torch.memory_format
    image: Any = field(repr=False)

    @property
    def positions(self) -> int:
        """The number of outputs of one channel, over the whole batch."""
        return self.out[0] * self.out[2] * self.out[3]


def patches(
    weight: tuple[int, int],
    x: Sequence[int],
    channels_last: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Patches:
    """The sizes for a weight `(O, C kh kw)` and x `(B, C, H, W)`. Errors: RequestError for sizes that do not fit."""
    if len(x) != 4 or x[1] * kernel[0] * kernel[1] != weight[1]:
        what = f"x {tuple(x)} with a kernel {kernel} does not fit a weight of {weight[1]} columns"
        raise RequestError(what, "", "x is (B, C, H, W) and the weight (O, C kh kw)")
    if (
        min(*kernel, *stride, *dilation) < 1
        or min(padding) < 0
        or max(*kernel, *stride, *padding, *dilation) > _LARGEST
    ):
        what = f"stride {stride}, padding {padding}, dilation {dilation} or kernel {kernel} is out of range"
        raise RequestError(what, f"they go from 1 to {_LARGEST}, padding from 0", "")
    batch, channels, height, width = x
    sides = zip((height, width), kernel, stride, padding, dilation, strict=True)
    high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    if min(high, wide) < 1:
        raise RequestError(f"x {tuple(x)} is smaller than the kernel {kernel}", "", "")
    image = signatures.Image(channels, height, width, batch, *kernel, *stride, *padding, *dilation, int(channels_last))
    layout, rows, plane = torch.channels_last if channels_last else torch.contiguous_format, weight[0], high * wide
    strides = (rows * plane, 1, rows * wide, rows) if channels_last else (rows * plane, plane, wide, 1)
    return Patches((batch, rows, high, wide), strides, layout, ctypes.pointer(image))


def run_patches(
    packed: PackedWeight,
    sizes: Patches,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    *,
    strict: bool = True,
) -> Tensor | None:
    """`conv2d` with few checks, strict by default.

    The caller has checked that all tensors are float32 on the CPU, and the shapes of bias and residual.
    """
    if packed.config.kind not in MANY_CODES:
        raise NotSupported(f"no convolution runs on {packed.config.kind.value}", "it is a layout for linear layers", "")
    x = x.contiguous(memory_format=sizes.layout)
    y = x.new_empty_strided(sizes.out, sizes.strides)  # faster than an empty tensor of a memory format
    residual = None if residual is None else residual.contiguous(memory_format=sizes.layout)
    code = library.entries().many_conv(
        packed.handle,
        sizes.image,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        ACTIVATION_CODES[activation],
        strict,
        packed.config.tile,
        library.thread_count(),
        y.data_ptr(),
    )
    if code == library.ODD_INPUT:
        return None
    if code:
        library.check_code(code)
    return y


def is_channels_last(x: Tensor) -> bool:
    """Whether an image is in the layout channels last and not also contiguous (as an image of one channel is)."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
