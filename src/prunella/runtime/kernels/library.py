"""The compiled kernels, as Python sees them: a weight is packed once, then multiplied.

The library has no torch and no Python in it; it gets addresses. Without it (no compiler at installation) `available()`
is False, and everything here that multiplies refuses.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardswish, relu, relu6, silu

from prunella.errors import NotSupported, PruningError, RequestError

_NAME = "libprunella.so"
_ABI = 9
"""`PRUNELLA_ABI` of kernels/prunella.h."""
ODD_INPUT = 7
_log = logging.getLogger(__name__)


class Activation(Enum):
    """What is applied to the sum, the bias and the residual."""

    NONE = "none"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    RELU6 = "relu6"
    HARDSWISH = "hardswish"


class Precision(Enum):
    """The type that values are multiplied in; sums are float32."""

    __hash__ = object.__hash__  # quicker than that of the name: choices are looked up in every call

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class Kind(Enum):
    """How the nonzeros are laid out.

    ROWS: rows side by side, each with its own columns. GROUPS: rows whose columns go by the pattern of their nonzeros.
    BLOCK16, BLOCK8, BLOCK4: so many neighbouring rows share their columns. PAIRS: as ROWS, two nonzeros of a row at a
    time, their values in bfloat16 as x is. DECODE, CSR: for a few tokens.
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


_MANY = {Kind.ROWS: 0, Kind.GROUPS: 1, Kind.BLOCK16: 2, Kind.BLOCK8: 3, Kind.BLOCK4: 4, Kind.PAIRS: 5}
NUMBERS = {
    Activation.NONE: 0, Activation.RELU: 1, Activation.GELU: 2, Activation.SILU: 3, Activation.RELU6: 4,
    Activation.HARDSWISH: 5,
}  # fmt: skip
_FEW = {Kind.DECODE: 0, Kind.CSR: 1}
IN_PLACE: dict[Activation, Any] = {
    Activation.RELU: relu, Activation.SILU: silu, Activation.RELU6: relu6, Activation.HARDSWISH: hardswish,
}  # fmt: skip
"""Those that torch can apply in the memory of their input."""
FEW = frozenset(_FEW)
"""The kinds for a few tokens."""
_FEW_PRECISIONS = {Precision.FP32: 0, Precision.BF16: 1, Precision.INT8: 2}


@dataclass(frozen=True)
class Config:
    """One kernel and its sizes: rows side by side, vectors of tokens side by side, columns of a block.

    tile 0, for blocks of 16 rows: these are the lanes, and nothing is turned over; 2 where the layout forbids that.
    """

    kind: Kind
    precision: Precision = Precision.FP32
    rows: int = 4
    tile: int = 4
    depth: int = 256


@dataclass(frozen=True)
class Packed:
    """A weight in the private layout of a kernel; the memory behind it goes with this object."""

    shape: tuple[int, int]
    nnz: int
    nbytes: int
    config: Config
    handle: int = field(repr=False)

    def __post_init__(self) -> None:
        free = _library().prunella_few_free if self.config.kind in _FEW else _library().prunella_many_free
        weakref.finalize(self, free, ctypes.c_void_p(self.handle))


class ImageSizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "height", "width", "batch")),
        *((name, ctypes.c_int32) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")),
        *((name, ctypes.c_int32) for name in ("dilation_h", "dilation_w", "last")),
    )


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prunella_tiers": (ctypes.c_char_p, ()),
    "prunella_tier": (ctypes.c_char_p, ()),
    "prunella_use": (_INT, (ctypes.c_char_p,)),
    "prunella_check": (_INT, (_LONG, _LONG, _LONG, _POINTER, _POINTER)),
    "prunella_many_pack": (
        _INT,
        (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, ctypes.POINTER(_POINTER)),
    ),
    "prunella_many_free": (None, (_POINTER,)),
    "prunella_many_bytes": (_LONG, (_POINTER,)),
    "prunella_many_linear": (
        _INT,
        (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER),
    ),
    "prunella_many_chain": (_INT, (_POINTER, _INT, _POINTER, _INT)),
    "prunella_many_conv": (
        _INT,
        (_POINTER, ctypes.POINTER(ImageSizes), _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER),
    ),
    "prunella_few_pack": (
        _INT,
        (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, ctypes.POINTER(_POINTER)),
    ),
    "prunella_few_free": (None, (_POINTER,)),
    "prunella_few_bytes": (_LONG, (_POINTER,)),
    "prunella_few_linear": (_INT, (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER)),
}
_WRONG = {
    1: ("the kernels cannot do this", "a size or an option is out of range"),
    2: ("the rows of a sparse weight are not well formed", "their starts do not rise to the number of nonzeros"),
    3: ("the columns of a sparse weight are not well formed", "they point outside, or do not rise"),
    4: ("there is no memory left for the sparse kernels", "the packed weight or its scratch does not fit"),
    6: ("a weight with NaN or infinity has no int8 form", "its scale is its largest number"),
}


@cache
def _found() -> ctypes.CDLL | None:
    """The library beside this file, with the tier that PRUNELLA_ISA asks for; None if it was not built."""
    file = Path(__file__).with_name(_NAME)
    if not file.exists():
        return None
    library = ctypes.CDLL(str(file))
    if not hasattr(library, "prunella_abi") or library.prunella_abi() != _ABI:
        _log.warning("the kernels in %s are of another version and are not used: install prunella again", file)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    asked = os.environ.get("PRUNELLA_ISA", "")
    if asked and library.prunella_use(asked.encode()):
        has = library.prunella_tiers().decode()
        raise RequestError(f"PRUNELLA_ISA={asked!r} cannot be used", f"this processor has {has}", "choose one, or none")
    return library


def _library() -> ctypes.CDLL:
    found = _found()
    if found is None:
        raise NotSupported(
            "the compiled kernels are not here",
            "prunella was installed without a compiler",
            "install a wheel, or install again where a C++ compiler is (from a checkout: make kernels)",
        )
    return found


def available() -> bool:
    """Whether the compiled library is here."""
    return _found() is not None


def isa() -> str:
    """The tier of instructions in use; "none" without the library."""
    found = _found()
    return str(found.prunella_tier().decode()) if found else "none"


def tiers() -> tuple[str, ...]:
    """The tiers that this processor can run, the best last."""
    found = _found()
    return tuple(found.prunella_tiers().decode().split(",")) if found else ()


def use_tier(name: str = "") -> None:
    """Run everything from now on with this tier; the best one without a name. Errors: RequestError for one not here."""
    if _library().prunella_use(name.encode()):
        raise RequestError(f"the tier {name!r} cannot be used", f"this processor has {', '.join(tiers())}", "")


def pack(weight: Tensor, config: Config) -> Packed:
    """A weight (M, K) in the layout of a kernel. Zeros are left out, so what x holds there is never read."""
    if not _has(config):
        raise NotSupported(f"no kernel packs {config.kind.value} in {config.precision.value}", "", "")
    if weight.dim() != 2:
        raise RequestError(f"a weight of {weight.dim()} axes cannot be packed", "two are needed", "")
    dense = weight.detach().to("cpu", torch.float32)
    rows, columns = dense.nonzero(as_tuple=True)
    values = dense[rows, columns].contiguous()
    starts = torch.zeros(dense.shape[0] + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(rows, minlength=dense.shape[0]).cumsum(0)
    return pack_rows((dense.shape[0], dense.shape[1]), starts, columns.contiguous(), values, config)


def pack_rows(shape: tuple[int, int], starts: Tensor, columns: Tensor, values: Tensor, config: Config) -> Packed:
    """The same from compressed rows: starts (M + 1) and columns int64, values float32; all is checked first."""
    fits = (
        starts.shape == (shape[0] + 1,)
        and columns.shape == values.shape
        and columns.dim() == 1
        and starts.dtype == columns.dtype == torch.int64
        and values.dtype == torch.float32
    )
    if not fits:
        raise RequestError(
            "compressed rows do not fit their shape", "", "starts is (M + 1,), columns and values are 1-D"
        )
    made, parts = _POINTER(), [part.contiguous() for part in (starts, columns, values)]
    pointers = [part.data_ptr() for part in parts]
    library = _library()
    if config.kind in _FEW:
        sizes: tuple[int, ...] = (_FEW[config.kind], _FEW_PRECISIONS[config.precision])
        make, measure = library.prunella_few_pack, library.prunella_few_bytes
    else:
        sizes = (_MANY[config.kind], config.rows, config.depth, int(config.precision is Precision.BF16))
        make, measure = library.prunella_many_pack, library.prunella_many_bytes
    check_code(make(*shape, len(values), *pointers, *sizes, ctypes.byref(made)))
    return Packed(shape, len(values), int(measure(made)), config, int(made.value or 0))


def _has(config: Config) -> bool:
    """Whether there is a kernel of that kind and precision."""
    if config.kind in _MANY:
        half = config.precision is Precision.BF16 and config.tile % 2 == 0
        return half or (config.precision is Precision.FP32 and config.kind is not Kind.PAIRS)
    return config.kind in _FEW and (config.kind is Kind.DECODE or config.precision is not Precision.INT8)


def linear(
    packed: Packed,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = Activation.NONE,
) -> Tensor:
    """`activation(x W' + bias + residual)`: x (..., K) -> (..., M), float32 on the CPU; bfloat16 is read as float32."""
    x = as_float32(x).contiguous()
    if x.shape[-1:] != packed.shape[1:]:
        raise RequestError(f"x has {tuple(x.shape)[-1:]} columns", f"the weight has {packed.shape[1]}", "")
    y = x.new_empty(*x.shape[:-1], packed.shape[0])
    tokens = y.numel() // max(packed.shape[0], 1)
    extra = extras(packed, y, bias, residual, torch.contiguous_format)
    given = (packed.handle, x.data_ptr(), tokens, *map(_address, extra), _fused(packed.config.kind, activation))
    threads = torch.get_num_threads()
    if packed.config.kind in _FEW:
        done = _library().prunella_few_linear(*given, 0, threads, y.data_ptr())
    else:
        done = _library().prunella_many_linear(*given, 0, packed.config.tile, threads, y.data_ptr())
    check_code(done)
    return _after(y, activation) if packed.config.kind in _FEW else y


def finite_linear(
    packed: Packed, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor | None:
    """`linear` with little around the kernel; None if x is not finite, or would not be in bfloat16.

    x, bias and residual are known to be float32 on the CPU, and x to have the columns of the weight.
    """
    x = x if x.is_contiguous() else x.contiguous()
    rows, columns = packed.shape
    y = x.new_empty((*x.shape[:-1], rows))
    plain = bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.numel() == rows)
    if residual is not None or not plain:
        bias, residual = extras(packed, y, bias, residual, torch.contiguous_format)
    run, few = entries(), packed.config.kind in FEW
    done = (run[0] if few else run[1])(
        packed.handle,
        x.data_ptr(),
        x.numel() // columns,
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        _fused(packed.config.kind, activation),
        1,
        *(() if few else (packed.config.tile,)),
        torch.get_num_threads(),
        y.data_ptr(),
    )
    if done:
        if done == ODD_INPUT:
            return None
        check_code(done)
    return _after(y, activation) if few else y


@cache
def entries() -> tuple[Any, Any, Any, Any]:
    library = _library()
    few, many = library.prunella_few_linear, library.prunella_many_linear
    return few, many, library.prunella_many_conv, library.prunella_many_chain


def as_float32(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"the kernels cannot read {x.dtype} on {x.device}", "float32 on the CPU is needed", "")
    return x.detach().float()


def extras(packed: Packed, y: Tensor, bias: Tensor | None, residual: Tensor | None, layout: Any) -> list[Tensor | None]:
    """Bias and residual as the kernels read them."""
    if bias is not None and bias.shape != packed.shape[:1]:
        raise RequestError(f"a bias of shape {tuple(bias.shape)} does not fit", f"{packed.shape[0]} rows", "")
    if residual is not None and residual.shape != y.shape:
        raise RequestError(f"a residual of shape {tuple(residual.shape)} does not fit", f"y is {tuple(y.shape)}", "")
    return [
        None if bias is None else as_float32(bias).contiguous(),
        None if residual is None else as_float32(residual).contiguous(memory_format=layout),
    ]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fused(kind: Kind, activation: Activation) -> int:
    """What a kernel is asked for; those for a few tokens know ReLU alone."""
    return NUMBERS[activation] if kind not in _FEW or activation is Activation.RELU else 0


def _after(y: Tensor, activation: Activation) -> Tensor:
    """What the kernels for a few tokens do not apply themselves."""
    if activation is Activation.GELU:
        return gelu(y)
    return y if activation in (Activation.NONE, Activation.RELU) else IN_PLACE[activation](y, inplace=True)


def check_code(code: int) -> None:
    if code:
        what, why = _WRONG.get(code, ("the sparse kernels failed", f"code {code}"))
        raise PruningError(what, why) if code in (4, 5) else RequestError(what, why, "")
