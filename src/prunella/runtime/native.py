"""The compiled kernels, as Python sees them. Here without the library: nothing is available."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from prunella.errors import NotSupported


class Activation(Enum):
    """What is applied to the sum."""

    NONE = "none"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


class Precision(Enum):
    """The type that values are multiplied in."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class Kind(Enum):
    """How the nonzeros are laid out."""

    ROWS = "rows"
    GROUPS = "groups"
    BLOCK16 = "block16"
    BLOCK8 = "block8"
    BLOCK4 = "block4"
    DECODE = "decode"
    CSR = "csr"


@dataclass(frozen=True)
class Config:
    """One kernel and its sizes."""

    kind: Kind
    precision: Precision = Precision.FP32
    rows: int = 4
    tile: int = 4
    depth: int = 256


@dataclass(frozen=True)
class Packed:
    """A weight in the private layout of a kernel."""

    shape: tuple[int, int]
    nnz: int
    nbytes: int
    config: Config


def available() -> bool:
    """Whether the compiled library is here."""
    return False


def isa() -> str:
    """The instruction-set tier that is used."""
    return "none"


def tiers() -> tuple[str, ...]:
    """The tiers that this processor can run."""
    return ()


def configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
    """Candidates, best guess first."""
    return ()


def pack(weight: Tensor, config: Config) -> Packed:
    """A weight in the layout of a kernel."""
    raise NotSupported("the compiled kernels are not here", "", "pip install prunella from a wheel")


def linear(
    packed: Packed,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = Activation.NONE,
) -> Tensor:
    """x (..., K) -> (..., M)."""
    raise NotSupported("the compiled kernels are not here", "", "pip install prunella from a wheel")


def conv2d(
    packed: Packed,
    x: Tensor,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = Activation.NONE,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Weight packed as (O, C*kh*kw)."""
    raise NotSupported("the compiled kernels are not here", "", "pip install prunella from a wheel")
