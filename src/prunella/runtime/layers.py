"""Layers that skip their zeros. They can be copied, saved and compiled, and run dense code where no kernel applies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.compress.storage import StorageFormat, encode
from prunella.errors import RequestError
from prunella.graph.work import is_counting
from prunella.runtime import operators
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Activation
from prunella.runtime.packed_cache import (
    ACTIVATE,
    PackedCache,
    add_and_activate,
    dense_matrix,
    is_finite,
    packed_for,
    run_linear,
)
from prunella.runtime.tuning.choice import Geometry, Route, Table, is_dense, is_few

PLAIN = (Tensor, nn.Parameter)


def _kernels_apply(x: Tensor, values: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> bool:
    """Whether a kernel may run: float32 on the CPU, no gradient, no autocast, and no count of operations in progress.

    It runs for every token: keep it fast.
    """
    if x.dtype is not torch.float32 or values.dtype is not torch.float32 or not (x.is_cpu and values.is_cpu):
        return False
    if residual is not None and (residual.dtype is not torch.float32 or not residual.is_cpu):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias, residual)):
        return False
    return not torch.is_autocast_enabled("cpu") and not is_counting()


def _wants_grad(parts: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


def _is_eager(x: Tensor) -> bool:
    """Whether the plain function may run instead of the operator: no compiler, and no subclass of Tensor."""
    return type(x) in PLAIN and not torch.compiler.is_compiling()


def canonical(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """The canonical form of a matrix: the values that are not zero, and one bit for each weight."""
    if not weight.numel() or weight.dim() != 2:
        raise RequestError(f"a weight of shape {tuple(weight.shape)} has no zeros to skip", "a matrix is needed")
    parts = encode(weight, StorageFormat.BITMASK).parts
    return nn.Parameter(parts["values"].clone(), requires_grad=False), parts["bits"]


def without_values(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose parameters have no memory, to rebuild the layer with other values."""
    empty = copy.copy(layer)
    empty._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in layer._parameters.items()
    }
    return empty


@final
class SparseLinear(nn.Module):
    """`y = activation(x W^T + b + residual)` without the zeros of `W (out, in)`; x `(..., in)`.

    The state dict has `values` and `bits` in place of the weight. Which kernel runs depends on the number of tokens
    (`table`). Dense code runs where a gradient is wanted, for other types and devices, and for x with NaN or infinity.
    activation_path: path of the activation module in the dense model, if there is one. dense: the layer that it
    replaces, without values, in a tuple of one so that it is not a submodule; empty for nn.Linear.
    """

    bits: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        table: Table,
        activation: Activation = Activation.NONE,
        activation_path: str = "",
        transposed: bool = False,
        dense: tuple[nn.Module, ...] = (),
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values, bits = canonical(weight)
        self.register_buffer("bits", bits)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))
        self.activation, self.activation_path, self.transposed = activation, activation_path, transposed
        self.dense = dense
        self.cache = PackedCache((self.out_features, self.in_features), table, activation)

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the shape that it has in the dense layer."""
        return self.matrix().t() if self.transposed else self.matrix()

    def matrix(self) -> Tensor:
        """The weight `(out, in)`."""
        shape = (self.out_features, self.in_features)
        if (torch.is_grad_enabled() and self.values.requires_grad) or torch.compiler.is_compiling():
            return dense_matrix(self.values, self.bits, shape)
        matrix: Tensor = self.cache.get(
            Route.TORCH, (self.values, self.bits), lambda: dense_matrix(self.values, self.bits, shape)
        )
        return matrix

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x `(..., in)`, residual `(..., out)` -> `(..., out)`."""
        # Read from the dictionaries of nn.Module: its __getattr__ takes longer than the kernel of a small layer.
        values, bias = self._parameters["values"], self._parameters["bias"]
        assert values is not None
        if not _kernels_apply(x, values, bias, residual):
            y = functional.linear(x, self.matrix(), bias)
            return ACTIVATE[self.activation](y if residual is None else y + residual)
        bits = self._buffers["bits"]
        assert bits is not None
        if _is_eager(x):
            return operators.linear(self.cache, x, values, bits, bias, residual)
        result: Tensor = operators.sparse_linear(x, values, bits, bias, residual, self.out_features, self.cache.key)
        return result

    def extra_repr(self) -> str:
        """Sizes, and the fraction of the weights that are zero."""
        sparsity = 1 - self.values.numel() / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, {sparsity:.1%} zeros, activation={self.activation.value}"


@final
class SparseConv2d(nn.Module):
    """`y = activation(norm(conv(x, W) + b) + residual)` without the zeros of `W (out, in, h, w)`, for one group.

    norm: a batch norm in eval mode. It is folded into the packed weight only: its own tensors do not change.
    norm_path: path of the batch norm in the dense model.
    """

    bits: Tensor
    bias: nn.Parameter | None
    norm: nn.BatchNorm2d | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        geometry: Geometry,
        table: Table,
        norm: nn.BatchNorm2d | None = None,
        norm_path: str = "",
        activation: Activation = Activation.NONE,
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.values, bits = canonical(weight.reshape(len(weight), -1))
        self.register_buffer("bits", bits)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))
        self.register_module("norm", norm)
        self.norm_path, self.activation, self.geometry = norm_path, activation, geometry
        self.cache = PackedCache(self.shape, table, activation, geometry)

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the shape that it has in the dense layer."""
        out, *rest = self.shape
        wide = rest[0] * rest[1] * rest[2]
        return dense_matrix(self.values, self.bits, (out, wide)).reshape(self.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x `(batch, in, h, w)`, residual as the output."""
        # Read from the dictionaries of nn.Module: its __getattr__ takes longer than the kernel of a small layer.
        values, bias, norm = self._parameters["values"], self._parameters["bias"], self._modules["norm"]
        assert values is not None
        parts = [] if norm is None else norm_parts(norm)
        norm_in_training = norm is not None and norm.training
        if norm_in_training or _wants_grad(parts) or x.dim() != 4 or not _kernels_apply(x, values, bias, residual):
            return self._dense(x, residual)
        eps = 0.0 if norm is None else float(norm.eps)  # type: ignore[arg-type]
        bits = self._buffers["bits"]
        assert bits is not None
        if _is_eager(x):
            return operators.conv2d(self.cache, x, values, bits, bias, residual, parts, eps)
        y: Tensor = operators.sparse_conv2d(
            x, values, bits, bias, residual, parts, eps, self.shape[0], self.cache.key,
            operators.numbers(self.geometry),
        )  # fmt: skip
        return y

    def parts(self) -> list[Tensor | None] | None:
        """The tensors that the packed weight is made from; None where no kernel may run."""
        values, bias, norm = self._parameters["values"], self._parameters["bias"], self._modules["norm"]
        assert values is not None
        if (norm is not None and norm.training) or values.dtype is not torch.float32 or not values.is_cpu:
            return None
        return [values, self._buffers["bits"], bias, *([] if norm is None else norm_parts(norm))]

    def packed(self, positions: int) -> tuple[Any, Tensor | None]:
        """Weight and bias in the layout of the choice for this number of output positions."""
        norm = [] if self.norm is None else norm_parts(self.norm)
        eps = 0.0 if self.norm is None else self.norm.eps
        choice = self.cache.choice(positions)
        return operators.weight_for(choice, self.cache, self.values, self.bits, self.bias, norm, eps)

    def _dense(self, x: Tensor, residual: Tensor | None) -> Tensor:
        g = self.geometry
        y = functional.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation)
        y = y if self.norm is None else self.norm(y)
        return ACTIVATE[self.activation](y if residual is None else y + residual)

    def extra_repr(self) -> str:
        """Sizes, and the fraction of the weights that are zero."""
        out, wide, *kernel = self.shape
        sparsity = 1 - self.values.numel() / (out * wide * kernel[0] * kernel[1])
        return f"{wide}, {out}, kernel={tuple(kernel)}, {sparsity:.1%} zeros, activation={self.activation.value}"


def norm_parts(norm: nn.Module) -> list[Tensor]:
    """Mean, variance, scale and shift of a batch norm: its own tensors, so that a cache can see a change of them."""
    buffers, parameters = norm._buffers, norm._parameters
    parts = [buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]]
    assert all(part is not None for part in parts)  # only such norms are fused
    return parts  # type: ignore[return-value]


@final
class FoldedConv2d(nn.Module):
    """`y = activation(norm(conv(x, W) + b) + residual)`, dense, with a batch norm in eval mode folded into W and b.

    weight and bias are those of the nn.Conv2d: the batch norm is folded into a cached copy.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, norm_path: str, activation: Activation) -> None:
        super().__init__()
        self.weight, self.bias, self.norm = conv.weight, conv.bias, norm
        self.norm_path, self.activation, self.groups = norm_path, activation, conv.groups
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.cache = PackedCache(tuple(conv.weight.shape), Table(((1, Route.TORCH),)), activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x `(batch, in, h, w)`, residual as the output."""
        weight, bias, norm = self.weight, self.bias, self.norm
        parts = norm_parts(norm)
        own = [weight, bias, *parts]
        if norm.training or not _is_eager(x) or not _kernels_apply(x, weight, bias, residual) or _wants_grad(own):
            y = norm(functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups))
            return ACTIVATE[self.activation](y if residual is None else y + residual)

        folded, shift = self.cache.get(
            Route.TORCH, own, lambda: operators.fold_batchnorm(weight, bias, parts, norm.eps)
        )
        y = functional.conv2d(x, folded, shift, self.stride, self.padding, self.dilation, self.groups)
        return add_and_activate(y, residual, self.activation)

    def extra_repr(self) -> str:
        """Sizes."""
        out, wide, *kernel = self.weight.shape
        return f"{wide * self.groups}, {out}, kernel={tuple(kernel)}, activation={self.activation.value}"


@final
class FastLinear(nn.Module):
    """A dense linear layer that runs the fastest operation for each number of tokens: of torch, or a kernel for a few.

    Its state dict has the keys of nn.Linear. A weight that is a Parameter stays the same object, and so stays tied.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, table: Table) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        is_parameter = isinstance(weight, nn.Parameter)
        self.weight = weight if is_parameter else nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))
        if not all(is_dense(choice) or is_few(choice) for _, choice in table.entries):
            raise RequestError(
                "a dense layer runs no kernel for many tokens", "the table names one", "use SparseLinear"
            )
        self.cache = PackedCache((self.out_features, self.in_features), table, Activation.NONE)

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in)` -> `(..., out)`."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        fits = x.dim() > 0 and x.shape[-1] == self.in_features and x.numel() > 0
        if not (_is_eager(x) and fits and _kernels_apply(x, weight, bias)):
            return functional.linear(x, weight, bias)
        choice = self.cache.choice(x.numel() // self.in_features)
        if choice is Route.INT8 and not is_finite(x):
            return functional.linear(x, weight, bias)
        packed: Any = self.cache.get(choice, (weight,), lambda: packed_for(weight.detach(), choice))
        if is_few(choice):
            y = library.finite_linear(packed, x, bias, None, Activation.NONE)
            return functional.linear(x, weight, bias) if y is None else y
        return run_linear(choice, packed, x, bias, None, Activation.NONE)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}"
