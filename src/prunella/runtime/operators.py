"""What the layers run: a plain call in eager mode, and a custom operator under compilers and fake tensors.

The operators take the canonical weight as tensors, so that a compiled graph knows what it reads; the number of a store
leads to the layout that a kernel wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.runtime.kernels import convolution
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import Config
from prunella.runtime.packed_cache import Store, dense_conv, finite, laid_out, run_linear, store, unpacked
from prunella.runtime.tuning.choice import Choice, Geometry, Route


def linear(
    held: Store, x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """A linear layer by the choice for this number of tokens."""
    rows, wide = held.matrix
    size = x.numel() // wide if x.dim() and x.shape[-1] == wide else 0
    choice, parts = held.choice(size), (values, bits)

    def make() -> Any:
        return laid_out(unpacked(values, bits, (rows, wide)), choice)

    if isinstance(choice, Config):
        y = native.finite_linear(held.get(choice, parts, make), x, bias, residual, held.activation)
        if y is not None:
            return y
        choice = Route.TORCH
    elif choice is Route.CSR and not finite(x):
        choice = Route.TORCH
    return run_linear(choice, held.get(choice, parts, make), x, bias, residual, held.activation)


def conv2d(
    held: Store, x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, residual: Tensor | None,
    norm: Sequence[Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """A convolution by the choice for this number of output positions."""
    made = held.patches(x.shape, convolution.is_last(x))
    choice = Route.TORCH if made is None else held.choice(made.positions)
    weight, shift = weight_for(choice, held, values, bits, bias, norm, eps)
    if made is not None and isinstance(choice, Config):
        fits = residual is None or residual.shape == made.out
        y = convolution.run_patches(weight, made, x, shift, residual, held.activation) if fits else None
        if y is not None:
            return y
        weight, shift = weight_for(Route.TORCH, held, values, bits, bias, norm, eps)
    assert held.geometry is not None  # a convolution's store has one
    return dense_conv(weight, x, shift, residual, held.activation, held.geometry, held.shape[1])


def weight_for(
    choice: Choice, held: Store, values: Tensor, bits: Tensor, bias: Tensor | None, norm: Sequence[Tensor], eps: float
) -> tuple[Any, Tensor | None]:
    """The weight of a convolution as a choice wants it, and the bias, both with the batch norm multiplied in."""

    def make() -> tuple[Any, Tensor | None]:
        matrix, shift = folded(unpacked(values, bits, held.matrix), bias, norm, eps)
        if shift is not None and shift.shape != matrix.shape[:1]:  # a kernel would read what lies behind it
            what = f"a bias of shape {tuple(shift.shape)} does not fit"
            raise RequestError(what, f"the layer has {len(matrix)} channels", "give one number for each")
        return laid_out(matrix, choice), None if shift is None else shift.float().contiguous()

    found: tuple[Any, Tensor | None] = held.get(choice, (values, bits, bias, *norm), make)
    return found


def folded(matrix: Tensor, bias: Tensor | None, norm: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor | None]:
    """A batch norm in eval mode multiplied into the weight and bias before it: `s = scale / sqrt(variance + eps)`."""
    if not norm:
        return matrix, bias
    mean, variance, scale, shift = (part.double() for part in norm)
    factor = scale / (variance + eps).sqrt()
    start = -mean if bias is None else bias.double() - mean
    return (matrix.double() * factor[:, None]).to(matrix.dtype), (start * factor + shift).to(matrix.dtype)


def _sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: int,
    key: int,
) -> torch.Tensor:
    return linear(store(key), x, values, bits, bias, residual).contiguous()


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
    y = conv2d(store(key), x, values, bits, bias, residual, norm, eps)
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
    """A geometry as the operator takes it."""
    return [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation]


def _geometry(given: Sequence[int]) -> Geometry:
    a, b, c, d, e, f, g, h = given
    return Geometry((a, b), (c, d), (e, f), (g, h))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if convolution.is_last(x) else torch.contiguous_format
