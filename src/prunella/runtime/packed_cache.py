"""One weight in the layouts that kernels want: made when first needed, made again when the weight changes.

What is stored for good is canonical: one bit for each weight, and the values that are not zero. Private layouts stay
here, are never written to a file and are not copied with a module.
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from prunella.errors import RequestError
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.convolution import Patches, patches
from prunella.runtime.kernels.library import Activation, Config
from prunella.runtime.tuning.choice import Choice, Geometry, Route, Table

_KEYS = itertools.count(1)
_MOST_SHAPES = 64
_STORES: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()
ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
    Activation.RELU6: functional.relu6,
    Activation.HARDSWISH: functional.hardswish,
}


@final
class Watch:
    """Tells whether tensors have changed."""

    def __init__(self) -> None:
        self.counted = True

    def stamp(self, parts: Sequence[Tensor | None]) -> list[tuple[int, int]]:
        """For each tensor where it lies, and how often it was written to."""
        if self.counted:
            try:
                return [(part.data_ptr(), part._version) for part in parts if part is not None]
            except RuntimeError:  # one made in inference mode counts no changes; raising takes as long as a small layer
                self.counted = False
        some = [part for part in parts if part is not None]
        return [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in some]


@final
class Store:
    """The choices of a layer, and its weight in the layouts that they need. A copy starts empty."""

    def __init__(
        self, shape: tuple[int, ...], table: Table, activation: Activation, geometry: Geometry | None = None
    ) -> None:
        self.shape, self.table, self.activation, self.geometry = shape, table, activation, geometry
        self.key = next(_KEYS)
        self._made: dict[Choice, Any] = {}
        self._near: dict[int, Choice] = {}
        self._patches: dict[tuple[torch.Size, bool], Patches | None] = {}
        self._stamp: list[tuple[int, int]] = []
        self._watch = Watch()
        _STORES[self.key] = self

    def __reduce__(self) -> tuple[type[Store], tuple[tuple[int, ...], Table, Activation, Geometry | None]]:
        return Store, (self.shape, self.table, self.activation, self.geometry)

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs, and the weights of each."""
        return self.shape[0], math.prod(self.shape[1:])

    def choice(self, size: int) -> Choice:
        """What to run for so many tokens or positions."""
        found = self._near.get(size)
        if found is None:
            found = self._near[size] = self.table.at(size)
        return found

    def patches(self, shape: torch.Size, last: bool) -> Patches | None:
        """The sizes of a convolution of x; None where a kernel cannot take it, and dense code will say why."""
        key = shape, last
        if key not in self._patches:
            if len(self._patches) >= _MOST_SHAPES:
                self._patches.clear()
            self._patches[key] = self._sized(*key)
        return self._patches[key]

    def _sized(self, shape: torch.Size, last: bool) -> Patches | None:
        g = self.geometry
        assert g is not None  # a convolution's store has one
        try:
            return patches(self.matrix, shape, last, g.kernel, g.stride, g.padding, g.dilation)
        except RequestError:
            return None

    def get(self, choice: Choice, parts: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
        """What `choice` needs, from `make` if there is none yet. parts: the tensors that it is made from."""
        stamp = self._watch.stamp(parts)
        if stamp != self._stamp:
            self._made, self._stamp = {}, stamp
        found = self._made.get(choice)
        if found is None:
            # A tensor made in inference mode could not be used again where gradients are wanted.
            with torch.inference_mode(False), torch.no_grad():
                found = self._made[choice] = make()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all private layouts made so far."""
        parts = [part[0] if isinstance(part, tuple) else part for part in self._made.values()]
        return sum(part.nbytes for part in parts if hasattr(part, "nbytes"))


def store(key: int) -> Store:
    """The store of that number."""
    return _STORES[key]


def laid_out(weight: Tensor, choice: Choice) -> Any:
    """A matrix `(out, in)` in the layout of a choice."""
    if isinstance(choice, Config):
        return native.pack(weight.contiguous(), choice)
    if choice is Route.ONEDNN:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    if choice is Route.CSR:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its sparse tensors are in beta
            return weight.to_sparse_csr()
    return weight


def run_linear(
    choice: Choice, held: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor:
    """`activation(x W^T + bias + residual)` by an operation of torch; `held` is the weight in its layout."""
    if choice is Route.CSR:
        flat = (held @ x.reshape(-1, x.shape[-1]).t()).t()
        y = flat.reshape(*x.shape[:-1], held.shape[0])
        y = y if bias is None else y + bias
    elif choice is Route.ONEDNN:
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), held, bias, "none", [], "")
    else:
        y = functional.linear(x, held, bias)
    return finished(y, residual, activation)


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
    return finished(y, residual, activation)


def finished(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """`activation(y + residual)`, in the memory of y, which nobody else has, unless one of them is spread."""
    if residual is not None:
        y = y.add_(residual) if residual.shape == y.shape else y + residual
    inside = native.IN_PLACE.get(activation)
    return ACTIVATE[activation](y) if inside is None else inside(y, inplace=True)


def finite(x: Tensor) -> bool:
    """Whether a sum of all values is finite: a skipped zero times infinity is not what dense code gives."""
    return math.isfinite(float(x.sum()))


def unpacked(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of a bit for each weight and the values that are not zero; gradients reach the values."""
    some = mask_of(bits, shape)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter(some, values)


def mask_of(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which weights are stored: bool, from bytes whose highest bit comes first."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> places) & 1
    return flat.reshape(-1)[: shape[0] * shape[1]].reshape(shape).to(torch.bool)
