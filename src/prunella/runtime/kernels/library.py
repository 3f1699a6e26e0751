"""The compiled kernels: a weight is packed once, then multiplied.

The library is plain C++ without torch and Python; it is given addresses. Where it was not built or cannot be loaded,
`available()` is False, `missing()` says why, and packing and multiplying raise NotSupported.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from prunella.errors import NotSupported, PruningError, RequestError
from prunella.runtime.kernels import signatures
from prunella.runtime.kernels.config import (
    ACTIVATION_CODES,
    DOT_ROWS,
    FEW,
    FEW_CODES,
    IN_PLACE,
    MANY_CODES,
    PRECISION_CODES,
    Activation,
    Config,
    Kind,
    Precision,
)

ODD_INPUT = signatures.ODD_INPUT
_log = logging.getLogger(__name__)
_forked = False


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the private layout of a kernel. Its memory is freed with this object."""

    shape: tuple[int, int]
    nnz: int
    nbytes: int
    config: Config
    handle: int = field(repr=False)

    def __post_init__(self) -> None:
        free = getattr(_library(), f"prunella_{_family(self.config)}_free")
        weakref.finalize(self, free, ctypes.c_void_p(self.handle))


def _family(config: Config) -> str:
    """The part of the library that has the kernel."""
    return "few" if config.kind in FEW else "dot" if config.kind in DOT_ROWS else "many"


# -- loading ----------------------------------------------------------------------------------------------------------


_ERRORS = {
    signatures.BAD_ARGUMENT: ("the kernels cannot do this", "a size or an option is out of range"),
    signatures.BAD_STARTS: (
        "the rows of a sparse weight are not well formed", "their starts do not rise to the number of nonzeros",
    ),
    signatures.BAD_INDEX: (
        "the columns of a sparse weight are not well formed", "a column is outside the matrix or out of order",
    ),
    signatures.NO_MEMORY: (
        "there is no memory left for the sparse kernels", "the packed weight or its scratch memory does not fit",
    ),
    signatures.ODD_INPUT: ("an input with NaN or infinity has no int8 form", "its range sets the scale"),
    signatures.NOT_FINITE: ("a weight with NaN or infinity has no int8 form", "its largest number sets the scale"),
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    why: str = ""


def file_name(platform: str = sys.platform) -> str:
    """The file of the library on a platform, as CMakeLists.txt names it."""
    return "libprunella" + {"darwin": ".dylib", "win32": ".dll"}.get(platform, ".so")


FILE = Path(__file__).with_name(file_name())


@cache
def load() -> Loaded:
    """The library next to this file, with the tier of PRUNELLA_ISA. Errors: RequestError for another tier."""
    loaded = _open(FILE)
    if loaded.library is None:
        if FILE.exists():
            _log.warning("%s", loaded.why)
        return loaded
    library, tier = loaded.library, os.environ.get("PRUNELLA_ISA", "")
    if tier and library.prunella_use(tier.encode()):
        why = f"this processor has {library.prunella_tiers().decode()}"
        raise RequestError(f"PRUNELLA_ISA={tier!r} cannot be used", why, "choose one of these, or unset the variable")
    return loaded


def _open(file: Path) -> Loaded:
    """The library of a file, with its functions typed."""
    if not file.exists():
        built = "are not built for Windows" if sys.platform == "win32" else "were not built when prunella was installed"
        return Loaded(None, f"the compiled kernels {built}")
    try:
        library = ctypes.CDLL(str(file))
        version = int(library.prunella_abi())
        if version != signatures.ABI:
            return Loaded(None, f"the compiled kernels in {file} are of version {version}, not {signatures.ABI}")
        for name, (result, arguments) in signatures.FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # a file of another platform, damaged, or without a function
        return Loaded(None, f"the compiled kernels cannot be loaded: {str(error).splitlines()[0]}")
    return Loaded(library)


def _library() -> ctypes.CDLL:
    loaded = load()
    if loaded.library is None:
        raise NotSupported("the compiled kernels cannot be used", loaded.why, remedy())
    return loaded.library


def remedy() -> str:
    """How to get the kernels."""
    if sys.platform == "win32":
        return "run prunella on Linux or macOS, or in WSL"
    return "install prunella from a wheel, or from source with a C++ compiler (in a checkout: make kernels)"


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return load().library is not None


def missing() -> str:
    """Why the compiled kernels cannot be used, in one sentence; empty if they can."""
    return load().why


def isa() -> str:
    """The tier of instructions in use; "none" without the library."""
    library = load().library
    return str(library.prunella_tier().decode()) if library else "none"


def tiers() -> tuple[str, ...]:
    """The tiers that this processor can run, the best last."""
    library = load().library
    return tuple(library.prunella_tiers().decode().split(",")) if library else ()


def use_tier(name: str = "") -> None:
    """Run all kernels with this tier from now on; without a name, the best. Errors: RequestError if it is missing."""
    if _library().prunella_use(name.encode()):
        raise RequestError(f"the tier {name!r} cannot be used", f"this processor has {', '.join(tiers())}", "")


def thread_count() -> int:
    """Threads of a kernel: those of torch, and one in a forked child, whose runtime would wait for the parent's."""
    return 1 if _forked else torch.get_num_threads()


def _after_fork() -> None:
    """One thread for torch too, whose own operations would not end in the child: its data loaders do the same."""
    global _forked
    _forked = True
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_code(code: int) -> None:
    """Errors: what a return code of the kernels means."""
    if code:
        what, why = _ERRORS.get(code, ("the sparse kernels failed", f"code {code}"))
        system = code in (signatures.NO_MEMORY, signatures.NO_TIER)
        raise PruningError(what, why) if system else RequestError(what, why, "")


# -- packing and multiplying ------------------------------------------------------------------------------------------


def pack(weight: Tensor, config: Config) -> PackedWeight:
    """A weight (M, K) in the layout of a kernel, without its zeros."""
    if not _exists(config):
        raise NotSupported(f"no kernel packs {config.kind.value} in {config.precision.value}", "", "")
    if weight.dim() != 2:
        raise RequestError(f"a weight of {weight.dim()} axes cannot be packed", "it needs two", "")
    dense = weight.detach().to("cpu", torch.float32)
    rows, columns = dense.nonzero(as_tuple=True)
    values = dense[rows, columns].contiguous()
    starts = torch.zeros(dense.shape[0] + 1, dtype=torch.int64, device="cpu")
    starts[1:] = torch.bincount(rows, minlength=dense.shape[0]).cumsum(0)
    return pack_rows((dense.shape[0], dense.shape[1]), starts, columns.contiguous(), values, config)


def pack_rows(shape: tuple[int, int], starts: Tensor, columns: Tensor, values: Tensor, config: Config) -> PackedWeight:
    """As `pack`, from compressed rows: starts (M + 1) and columns int64, values float32. All are checked."""
    valid = (
        starts.shape == (shape[0] + 1,)
        and columns.shape == values.shape
        and columns.dim() == 1
        and starts.dtype == columns.dtype == torch.int64
        and values.dtype == torch.float32
    )
    if not valid:
        raise RequestError(
            "compressed rows do not fit their shape", "", "starts is (M + 1,), columns and values are 1-D"
        )
    handle, parts = ctypes.c_void_p(), [part.contiguous() for part in (starts, columns, values)]
    pointers = [part.data_ptr() for part in parts]
    library = _library()
    precision = PRECISION_CODES[config.precision]
    if config.kind in FEW:
        options: tuple[int, ...] = (FEW_CODES[config.kind], precision)
    elif config.kind in DOT_ROWS:
        options = (DOT_ROWS[config.kind], config.depth)
    else:
        options = (MANY_CODES[config.kind], config.rows, config.depth, precision)
    pack_, count_bytes = (getattr(library, f"prunella_{_family(config)}_{verb}") for verb in ("pack", "bytes"))
    check_code(pack_(*shape, len(values), *pointers, *options, ctypes.byref(handle)))
    return PackedWeight(shape, len(values), int(count_bytes(handle)), config, int(handle.value or 0))


def _exists(config: Config) -> bool:
    """Whether there is a kernel of that kind and precision."""
    if config.kind in MANY_CODES:
        half = config.precision is Precision.BF16 and config.tile % 2 == 0
        return half or (config.precision is Precision.FP32 and config.kind is not Kind.PAIRS)
    if config.kind in DOT_ROWS:
        return config.precision is Precision.INT8
    return config.kind is Kind.DECODE or config.precision is not Precision.INT8


def linear(
    packed: PackedWeight,
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
    addends = checked_addends(packed, y, bias, residual, torch.contiguous_format)
    arguments = (packed.handle, x.data_ptr(), tokens, *map(_address, addends), _in_kernel(packed, activation))
    threads = thread_count()
    if packed.config.kind in FEW:
        code = _library().prunella_few_linear(*arguments, 0, threads, y.data_ptr())
    elif packed.config.kind in DOT_ROWS:
        code = _library().prunella_dot_linear(*arguments, 0.0, 0, packed.config.tile, threads, y.data_ptr())
    else:
        code = _library().prunella_many_linear(*arguments, 0, packed.config.tile, threads, y.data_ptr())
    check_code(code)
    return _after_kernel(y, activation) if packed.config.kind in FEW else y


def calibrated_linear(packed: PackedWeight, x: Tensor, scale: float, zero: int) -> Tensor:
    """`x W'` in int8 with one scale for all tokens: x becomes `round(x / scale) + zero`, held to 0 to 255.

    Errors: RequestError for a scale that is not a positive number or a zero outside 0 to 255.
    """
    if not (0 < scale < math.inf and 1 / scale < 3e38 and 0 <= zero <= 255):
        raise RequestError(f"scale={scale!r} and zero={zero!r} are out of range", "scale > 0 and zero of 0 to 255", "")
    x = as_float32(x).contiguous()
    y = x.new_empty(*x.shape[:-1], packed.shape[0])
    if x.shape[-1:] != packed.shape[1:] or packed.config.kind not in DOT_ROWS:
        raise RequestError(f"x has {tuple(x.shape)[-1:]} columns", f"the weight is {packed.shape} in int8 blocks", "")
    tokens = y.numel() // max(packed.shape[0], 1)
    where = (packed.handle, x.data_ptr(), tokens, None, None, ACTIVATION_CODES[Activation.NONE])
    check_code(entries().dot_linear(*where, scale, zero, packed.config.tile, thread_count(), y.data_ptr()))
    return y


def finite_linear(
    packed: PackedWeight, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor | None:
    """`linear` with few checks; None if x holds NaN or infinity, or a number that is infinite in bfloat16.

    The caller has checked that x, bias and residual are float32 on the CPU, and that x has the columns of the weight.
    """
    x = x if x.is_contiguous() else x.contiguous()
    rows, columns = packed.shape
    y = x.new_empty((*x.shape[:-1], rows))
    plain = bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.numel() == rows)
    if residual is not None or not plain:
        bias, residual = checked_addends(packed, y, bias, residual, torch.contiguous_format)
    functions, kind = entries(), packed.config.kind
    few, dot = kind in FEW, kind in DOT_ROWS
    code = (functions.few_linear if few else functions.dot_linear if dot else functions.many_linear)(
        packed.handle,
        x.data_ptr(),
        x.numel() // columns,
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        _in_kernel(packed, activation),
        *((0.0, 0) if dot else (1,)),
        *(() if few else (packed.config.tile,)),
        thread_count(),
        y.data_ptr(),
    )
    if code:
        if code == ODD_INPUT:
            return None
        check_code(code)
    return _after_kernel(y, activation) if few else y


class Entries(NamedTuple):
    """The functions that layers call, looked up once."""

    few_linear: Any
    dot_linear: Any
    many_linear: Any
    many_conv: Any
    many_chain: Any


@cache
def entries() -> Entries:
    """The functions of the loaded library. Errors: NotSupported without one."""
    library = _library()
    return Entries(*(getattr(library, f"prunella_{name}") for name in Entries._fields))


def as_float32(x: Tensor) -> Tensor:
    """x in float32. Errors: RequestError for other types than float32 and bfloat16, and other devices than the CPU."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"the kernels cannot read {x.dtype} on {x.device}", "float32 on the CPU is needed", "")
    return x.detach().float()


def checked_addends(
    packed: PackedWeight, y: Tensor, bias: Tensor | None, residual: Tensor | None, layout: torch.memory_format
) -> list[Tensor | None]:
    """Bias and residual as the kernels read them. Errors: RequestError for other shapes than those of y."""
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


def _in_kernel(packed: PackedWeight, activation: Activation) -> int:
    """The code of the activation that the kernel applies: those for a few tokens apply only ReLU."""
    inside = packed.config.kind not in FEW or activation is Activation.RELU
    return ACTIVATION_CODES[activation if inside else Activation.NONE]


def _after_kernel(y: Tensor, activation: Activation) -> Tensor:
    """The activation, where the kernels for a few tokens do not apply it."""
    if activation is Activation.GELU:
        return gelu(y)
    return y if activation in (Activation.NONE, Activation.RELU) else IN_PLACE[activation](y, inplace=True)
