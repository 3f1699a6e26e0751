"""A cache of one weight, packed as the kernels need it: filled on first use, and again when the weight has changed.

The parameters of a layer are in the canonical form: one bit for each weight, and the values that are not zero. Packed
weights are only in this cache: they are not saved to a file, and not copied with a module.
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from prunella.errors import RequestError
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import IN_PLACE, Activation, Config
from prunella.runtime.kernels.convolution import Patches, patches
from prunella.runtime.tuning.choice import Choice, Geometry, Route, Table

_KEYS = itertools.count(1)
_MOST_SHAPES = 64
_CACHES: weakref.WeakValueDictionary[int, PackedCache] = weakref.WeakValueDictionary()
ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
    Activation.RELU6: functional.relu6,
    Activation.HARDSWISH: functional.hardswish,
}


@final
class ChangeTracker:
    """Detects whether tensors have changed."""

    def __init__(self) -> None:
        self.all_have_versions = True

    def version(self, parts: Sequence[Tensor | None]) -> list[tuple[int, int]]:
        """The address and the version counter of each tensor."""
        if self.all_have_versions:
            try:
                return [(part.data_ptr(), part._version) for part in parts if part is not None]
            except RuntimeError:  # a tensor made in inference mode has no version; raising is as slow as a small layer
                self.all_have_versions = False
        given = [part for part in parts if part is not None]
        return [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in given]


@final
class PackedCache:
    """The choices of a layer, and its weight in the layouts that they need. A copy of it is empty."""

    def __init__(
        self, shape: tuple[int, ...], table: Table, activation: Activation, geometry: Geometry | None = None
    ) -> None:
        self.shape, self.table, self.activation, self.geometry = shape, table, activation, geometry
        self.key = next(_KEYS)
        self._packed: dict[Choice, Any] = {}
        self._choices: dict[int, Choice] = {}
        self._patches: dict[tuple[torch.Size, bool], Patches | None] = {}
        self._version: list[tuple[int, int]] = []
        self._tracker = ChangeTracker()
        _CACHES[self.key] = self

    def __reduce__(self) -> tuple[type[PackedCache], tuple[tuple[int, ...], Table, Activation, Geometry | None]]:
        return PackedCache, (self.shape, self.table, self.activation, self.geometry)

    @property
    def matrix(self) -> tuple[int, int]:
        """Number of outputs, and of weights for each output."""
        return self.shape[0], math.prod(self.shape[1:])

    def choice(self, size: int) -> Choice:
        """The choice for this number of tokens, or of output positions of a convolution."""
        choice = self._choices.get(size)
        if choice is None:
            choice = self._choices[size] = self.table.at(size)
        return choice

    def patches(self, shape: torch.Size, channels_last: bool) -> Patches | None:
        """The sizes of the convolution for x of this shape; None if they do not fit, which dense code will report."""
        key = shape, channels_last
        if key not in self._patches:
            if len(self._patches) >= _MOST_SHAPES:
                self._patches.clear()
            self._patches[key] = self._compute_patches(*key)
        return self._patches[key]

    def _compute_patches(self, shape: torch.Size, channels_last: bool) -> Patches | None:
        g = self.geometry
        assert g is not None  # the cache of a convolution has one
        try:
            return patches(self.matrix, shape, channels_last, g.kernel, g.stride, g.padding, g.dilation)
        except RequestError:
            return None

    def get(self, choice: Choice, parts: Sequence[Tensor | None], pack: Callable[[], Any]) -> Any:
        """The weight as `choice` needs it, from `pack` if it is not cached. parts: the tensors that `pack` reads."""
        version = self._tracker.version(parts)
        if version != self._version:
            self._packed, self._version = {}, version
        packed = self._packed.get(choice)
        if packed is None:
            # A tensor made in inference mode could not be used later in a call that wants gradients.
            with torch.inference_mode(False), torch.no_grad():
                packed = self._packed[choice] = pack()
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights in the cache."""
        weights = [packed[0] if isinstance(packed, tuple) else packed for packed in self._packed.values()]
        return sum(weight.nbytes for weight in weights if hasattr(weight, "nbytes"))


def cache_of(key: int) -> PackedCache:
    """The cache with this key."""
    return _CACHES[key]


def packed_for(weight: Tensor, choice: Choice) -> Any:
    """A matrix `(out, in)` in the layout of a choice."""
    if isinstance(choice, Config):
        return library.pack(weight.contiguous(), choice)
    if choice is Route.ONEDNN:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    if choice is Route.INT8:
        return dense_int8(weight)
    if choice is Route.CSR:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that its sparse tensors are in beta
            return weight.to_sparse_csr()
    return weight


def dense_int8(weight: Tensor) -> Any:
    """A matrix `(out, in)` for the dynamic int8 operation of torch: a scale for each row, its largest / 127."""
    scales = weight.abs().amax(1).double().div(127).clamp_min(1e-30)
    zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a later release will not have its quantized tensors
        codes = torch.quantize_per_channel(weight.contiguous(), scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(codes, None)


@cache
def _has_vnni() -> bool:
    """Whether the processor adds products of 8 bits without overflow; otherwise x has 7 bits, as torch advises."""
    return bool(torch.cpu._is_vnni_supported())


def run_linear(
    choice: Choice, packed: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor:
    """`activation(x W^T + bias + residual)` by an operation of torch; `packed` is the weight in its layout."""
    if choice is Route.CSR:
        flat = (packed @ x.reshape(-1, x.shape[-1]).t()).t()
        y = flat.reshape(*x.shape[:-1], packed.shape[0])
        y = y if bias is None else y + bias
    elif choice is Route.INT8:
        y = torch.ops.quantized.linear_dynamic(x.contiguous(), packed, not _has_vnni())
        y = y if bias is None else y.add_(bias)
    elif choice is Route.ONEDNN:
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    else:
        y = functional.linear(x, packed, bias)
    return add_and_activate(y, residual, activation)


def dense_conv(
    matrix: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    geometry: Geometry,
    channels: int,
) -> Tensor:
    """`activation(conv(x, W) + bias + residual)`, with W as a matrix."""
    weight = matrix.reshape(matrix.shape[0], channels, *geometry.kernel)
    y = functional.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
    return add_and_activate(y, residual, activation)


def add_and_activate(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """`activation(y + residual)`, in the memory of y where that is possible: nothing else may read y."""
    if residual is not None:
        y = y.add_(residual) if residual.shape == y.shape else y + residual
    in_place = IN_PLACE.get(activation)
    return ACTIVATE[activation](y) if in_place is None else in_place(y, inplace=True)


def is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN or infinity, by its sum. Otherwise zeros may not be skipped: 0 * inf is NaN."""
    return math.isfinite(float(x.sum()))


def dense_matrix(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix of the canonical form; gradients reach the values."""
    mask = mask_of(bits, shape)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def mask_of(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask of the nonzeros: bool, from bytes whose highest bit is the first."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> places) & 1
    return flat.reshape(-1)[: shape[0] * shape[1]].reshape(shape).to(torch.bool)
