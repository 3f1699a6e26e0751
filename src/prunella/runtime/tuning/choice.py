"""The kernel of a layer for each number of tokens: a compiled kernel, or a dense or sparse operation of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from prunella.errors import BadInput
from prunella.runtime.kernels.config import FEW, Config, Kind, Precision


class Route(Enum):
    """Operations of torch."""

    TORCH = "torch"
    """`F.linear` or `F.conv2d`."""
    ONEDNN = "onednn"
    """The linear operation of oneDNN, with its own copy of the weight."""
    INT8 = "torch.int8"
    """The dynamic int8 linear operation of torch: weights with a scale for each row, x with one for all tokens."""
    CSR = "torch.csr"
    """`torch.sparse` CSR times dense."""
    COMPILED = "torch.compile"
    """On an accelerator: `F.linear`, compiled."""
    SEMI = "torch.2:4"
    """On an accelerator: `torch.sparse.to_sparse_semi_structured`."""
    BSR16 = "torch.bsr16"
    """On an accelerator: Triton's product of a weight in blocks of 16x16; `BSR32` and `BSR64` have larger blocks."""
    BSR32 = "torch.bsr32"
    BSR64 = "torch.bsr64"

    @property
    def dense(self) -> bool:
        """Whether the operation multiplies the zeros."""
        return self in (Route.TORCH, Route.ONEDNN, Route.INT8, Route.COMPILED)

    @property
    def portable(self) -> bool:
        """Whether it is an operation of the CPU, which a saved model may name."""
        return self in (Route.TORCH, Route.ONEDNN, Route.INT8, Route.CSR)


Choice = Route | Config


@dataclass(frozen=True)
class Table:
    """Number of tokens (for a convolution, of output positions) -> choice. Other numbers take the nearest, by ratio."""

    entries: tuple[tuple[int, Choice], ...]

    def at(self, size: int) -> Choice:
        """The choice for `size` tokens."""
        if not self.entries or size < 1:
            return Route.TORCH
        return min(self.entries, key=lambda entry: abs(math.log(entry[0] / size)))[1]

    @property
    def sparse(self) -> bool:
        """Whether any choice skips zeros."""
        return any(not is_dense(choice) for _, choice in self.entries)

    @property
    def replaces(self) -> bool:
        """Whether any choice is a reason to replace the layer."""
        return any(is_replacement(choice) for _, choice in self.entries)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def positions(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output."""
        high, wide = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return max(high, 0), max(wide, 0)


@dataclass(frozen=True)
class Problem:
    """The input that a layer is measured with. size: tokens or output positions. image: shape, for a convolution."""

    size: int
    image: tuple[int, ...] = field(default=())


def is_dense(choice: Choice) -> bool:
    """Whether the choice multiplies the zeros."""
    return isinstance(choice, Route) and choice.dense


def is_replacement(choice: Choice) -> bool:
    """Whether the choice is a reason to replace a layer: it skips zeros, or multiplies in int8."""
    return choice is Route.INT8 or not is_dense(choice)


def is_few(choice: Choice) -> bool:
    """Whether the choice is a kernel for a few tokens."""
    return isinstance(choice, Config) and choice.kind in FEW


def describe(choice: Choice) -> str:
    """A choice in a few words, for the record."""
    if isinstance(choice, Route):
        return _DESCRIBED[choice]
    return f"{choice.kind.value} {choice.precision.value}"


_DESCRIBED = {
    Route.TORCH: "dense",
    Route.ONEDNN: "dense (oneDNN)",
    Route.INT8: "dense int8",
    Route.CSR: "torch CSR",
    Route.COMPILED: "dense (compiled)",
    Route.SEMI: "2:4",
    Route.BSR16: "blocks of 16x16",
    Route.BSR32: "blocks of 32x32",
    Route.BSR64: "blocks of 64x64",
}


def to_json(choice: Choice) -> Any:
    """A choice as JSON data; `from_json` reads it."""
    if isinstance(choice, Route):
        return choice.value
    return {
        "kind": choice.kind.value,
        "precision": choice.precision.value,
        "rows": choice.rows,
        "tile": choice.tile,
        "depth": choice.depth,
    }


def from_json(data: Any) -> Choice:
    """The choice that `to_json` wrote. Errors: BadInput for anything else."""
    try:
        if isinstance(data, str):
            route = Route(data)
            if not route.portable:
                raise ValueError(f"{data!r} is an operation of an accelerator")
            return route
        if not isinstance(data, Mapping):
            raise TypeError(f"a {type(data).__name__}")
        numbers = {name: _small(data[name]) for name in ("rows", "tile", "depth")}
        return Config(Kind(data["kind"]), Precision(data["precision"]), **numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            "the manifest names a kernel that does not exist", str(error), "write the folder again"
        ) from error


def _small(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 1 << 20:
        raise ValueError(f"{value!r} is not a size of a kernel")
    return value
