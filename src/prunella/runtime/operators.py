"""The operators of the layers: plain functions in eager mode, custom operators under compilers and for fake tensors.

The operators take the weight in its canonical form, as tensors, so that a compiled graph knows what it reads. The key
of the layer's cache leads to the packed weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from prunella.errors import RequestError
from prunella.runtime.kernels import convolution, library
from prunella.runtime.kernels.config import Config
from prunella.runtime.packed_cache import (
    PackedCache,
    cache_of,
    dense_conv,
    dense_matrix,
    is_finite,
    packed_for,
    run_linear,
)
from prunella.runtime.tuning.choice import Choice, Geometry, Route


def linear(
    cache: PackedCache, x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """A linear layer by the choice for this number of tokens."""
    rows, columns = cache.matrix
    size = x.numel() // columns if x.dim() and x.shape[-1] == columns else 0
    choice, parts = cache.choice(size), (values, bits)

    def pack() -> Any:
        return packed_for(dense_matrix(values, bits, (rows, columns)), choice)

    if isinstance(choice, Config):
        y = library.finite_linear(cache.get(choice, parts, pack), x, bias, residual, cache.activation)
        if y is not None:
            return y
        choice = Route.TORCH
    elif choice in (Route.CSR, Route.INT8) and not is_finite(x):
        choice = Route.TORCH
    return run_linear(choice, cache.get(choice, parts, pack), x, bias, residual, cache.activation)


def conv2d(
    cache: PackedCache, x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None,
    norm: Sequence[Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """A convolution by the choice for this number of output positions."""
    patches = cache.patches(x.shape, convolution.is_channels_last(x))
    choice = Route.TORCH if patches is None else cache.choice(patches.positions)
    weight, shift = weight_for(choice, cache, values, bits, bias, norm, eps)
    if patches is not None and isinstance(choice, Config):
        fits = residual is None or residual.shape == patches.out
        y = convolution.run_patches(weight, patches, x, shift, residual, cache.activation) if fits else None
        if y is not None:
            return y
        weight, shift = weight_for(Route.TORCH, cache, values, bits, bias, norm, eps)
    assert cache.geometry is not None  # the cache of a convolution has one
    return dense_conv(weight, x, shift, residual, cache.activation, cache.geometry, cache.shape[1])


def weight_for(
    choice: Choice,
    cache: PackedCache,
    values: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    norm: Sequence[Tensor],
    eps: float,
) -> tuple[Any, Tensor | None]:
    """The weight of a convolution in the layout of a choice, and the bias; the batch norm is folded into both."""

    def pack() -> tuple[Any, Tensor | None]:
        matrix, shift = fold_batchnorm(dense_matrix(values, bits, cache.matrix), bias, norm, eps)
        if shift is not None and shift.shape != matrix.shape[:1]:  # a kernel would read beyond its end
            what = f"a bias of shape {tuple(shift.shape)} does not fit"
            raise RequestError(what, f"the layer has {len(matrix)} channels", "give one number for each")
        return packed_for(matrix, choice), None if shift is None else shift.float().contiguous()

    packed: tuple[Any, Tensor | None] = cache.get(choice, (values, bits, bias, *norm), pack)
    return packed


def fold_batchnorm(
    weight: Tensor, bias: Tensor | None, norm: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor | None]:
    """A weight `(out, ...)` and a bias with the batch norm after them folded in, as in eval mode.

    norm: mean, variance, scale and shift, or nothing. Computed in float64, so that only the result is rounded.
    """
    if not norm:
        return weight, bias
    exact = [None if part is None else part.detach().double() for part in (weight, bias, *norm)]
    new_weight, new_bias = fuse_conv_bn_weights(exact[0], exact[1], exact[2], exact[3], eps, exact[4], exact[5])  # type: ignore[arg-type]
    return new_weight.detach().to(weight.dtype), new_bias.detach().to(weight.dtype)


def _sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: int,
    key: int,
) -> torch.Tensor:
    return linear(cache_of(key), x, values, bits, bias, residual).contiguous()


def _sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Sequence[torch.Tensor],
    eps: float,
    rows: int,
    key: int,
    geometry: Sequence[int],
) -> torch.Tensor:
    y = conv2d(cache_of(key), x, values, bits, bias, residual, norm, eps)
    return y.contiguous(memory_format=_format(x))


sparse_linear: Any = torch.library.custom_op("prunella::sparse_linear", _sparse_linear, mutates_args=())
sparse_conv2d: Any = torch.library.custom_op("prunella::sparse_conv2d", _sparse_conv2d, mutates_args=())


@sparse_linear.register_fake  # type: ignore[untyped-decorator]
def _(
    x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, key: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@sparse_conv2d.register_fake  # type: ignore[untyped-decorator]
def _(
    x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Sequence[Tensor],
    eps: float, rows: int, key: int, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    high, wide = _geometry(geometry).positions((x.shape[2], x.shape[3]))
    return x.new_empty((x.shape[0], rows, high, wide)).contiguous(memory_format=_format(x))


def numbers(geometry: Geometry) -> list[int]:
    """A geometry as the operator takes it; `_geometry` is the inverse."""
    return [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation]


def _geometry(sizes: Sequence[int]) -> Geometry:
    kernel, stride, padding, dilation = zip(sizes[::2], sizes[1::2], strict=True)
    return Geometry(kernel, stride, padding, dilation)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if convolution.is_channels_last(x) else torch.contiguous_format
