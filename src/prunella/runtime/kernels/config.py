"""The choice of a kernel: activation, precision, layout of the nonzeros and sizes, with the codes of the library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch.nn.functional import hardswish, relu, relu6, silu

from prunella.runtime.kernels import signatures


class Activation(Enum):
    """The function that is applied to the sum of the product, the bias and the residual."""

    NONE = "none"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    RELU6 = "relu6"
    HARDSWISH = "hardswish"


class Precision(Enum):
    """The type that values are multiplied in; sums are float32."""

    __hash__ = object.__hash__  # faster than the hash of the name: every call of a layer looks up its choice

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class Kind(Enum):
    """The layout of the nonzeros.

    ROWS: each row with its own columns, several rows side by side. GROUPS: neighboring rows, whose columns are sorted
    by which of the rows have a nonzero there. BLOCK16, BLOCK8, BLOCK4: that many neighboring rows share their columns.
    PAIRS: as ROWS, but two nonzeros of a row at a time, with values and x in bfloat16. DECODE, CSR: for a few tokens.
    BLOCK4X4, BLOCK2X4, BLOCK1X4: int8, blocks of that many rows and four columns. A block with any nonzero is stored
    with all its weights.
    """

    __hash__ = object.__hash__

    ROWS = "rows"
    GROUPS = "groups"
    BLOCK16 = "block16"
    BLOCK8 = "block8"
    BLOCK4 = "block4"
    PAIRS = "pairs"
    DECODE = "decode"
    CSR = "csr"
    BLOCK4X4 = "block4x4"
    BLOCK2X4 = "block2x4"
    BLOCK1X4 = "block1x4"


ACTIVATION_CODES = {
    Activation.NONE: signatures.NONE, Activation.RELU: signatures.RELU, Activation.GELU: signatures.GELU,
    Activation.SILU: signatures.SILU, Activation.RELU6: signatures.RELU6, Activation.HARDSWISH: signatures.HARDSWISH,
}  # fmt: skip
MANY_CODES = {
    Kind.ROWS: signatures.ROWS, Kind.GROUPS: signatures.GROUPS, Kind.BLOCK16: signatures.BLOCK16,
    Kind.BLOCK8: signatures.BLOCK8, Kind.BLOCK4: signatures.BLOCK4, Kind.PAIRS: signatures.PAIRS,
}  # fmt: skip
"""Layouts for many tokens."""
FEW_CODES = {Kind.DECODE: signatures.BITMAP, Kind.CSR: signatures.CSR}
"""Layouts for a few tokens."""
PRECISION_CODES = {
    Precision.FP32: signatures.FP32, Precision.BF16: signatures.BF16, Precision.INT8: signatures.INT8,
}  # fmt: skip
FEW = frozenset(FEW_CODES)
DOT_ROWS = {Kind.BLOCK4X4: 4, Kind.BLOCK2X4: 2, Kind.BLOCK1X4: 1}
"""Rows of a block of the int8 layouts for many tokens."""
IN_PLACE: dict[Activation, Any] = {
    Activation.RELU: relu, Activation.SILU: silu, Activation.RELU6: relu6, Activation.HARDSWISH: hardswish,
}  # fmt: skip
"""Activations that torch can apply in the memory of their input."""


@dataclass(frozen=True)
class Config:
    """One kernel and its sizes. rows, tile: rows and vectors of tokens side by side. depth: columns of a block.

    tile 0 is for blocks of 16 rows: the rows are the lanes of a vector, and x is not transposed. Where the layout of x
    forbids that, the kernel runs with tile 2.
    """

    kind: Kind
    precision: Precision = Precision.FP32
    rows: int = 4
    tile: int = 4
    depth: int = 256
