"""Lossless storage formats of sparse weights, and the bytes of values and indices in each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.registry.method import metric

BLOCK = 4
"""Side of the blocks of `StorageFormat.BSR`."""


class StorageFormat(Enum):
    """The formats for the non-zeros of a matrix `(out, in)`. Indices are int32."""

    DENSE = "dense"
    COO = "coo"
    CSR = "csr"
    BSR = "bsr"
    BITMASK = "bitmask"
    TWO_OF_FOUR = "2:4"


@dataclass(frozen=True)
class Stored:
    """A weight in one format: `values` and their positions.

    COO: `rows`, `cols`. CSR: `starts` (out + 1) and `cols`. BSR: the same for blocks of 4x4, padded with zeros.
    BITMASK: `bits`, one per weight. TWO_OF_FOUR: `bits`, two for each of two values in every four.
    """

    form: StorageFormat
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, without a header."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def encode(weight: Tensor, form: StorageFormat) -> Stored:
    """A weight in a format; `decode` restores every bit except the sign of zeros.

    Errors: RequestError for an empty weight, and for 2:4 if four consecutive columns hold more than two values.
    """
    if not weight.numel():
        raise RequestError(f"a weight of shape {tuple(weight.shape)} holds nothing", "", "leave it out")
    matrix = _matrix(weight.detach().cpu())
    parts = _ENCODERS[form](matrix)
    return Stored(form, tuple(weight.shape), weight.dtype, parts)


def decode(stored: Stored) -> Tensor:
    """The weight. Errors: BadInput for parts that contradict each other or the shape."""
    if not stored.shape or min(stored.shape) < 1:
        raise BadInput(f"a stored weight has the shape {stored.shape}", "every size is 1 or more")
    return _DECODERS[stored.form](stored).reshape(stored.shape)


@metric(source="Buluc et al. 2009, doi:10.1145/1583991.1584053 (formats); Mishra et al. 2021, arXiv:2104.08378 (2:4)")
def stored_bytes(weight: Tensor, form: StorageFormat) -> int:
    """Bytes of a weight in a format, values and indices, without writing a file.

    With n weights of b bytes in r rows, k of them not zero: dense `n b`, COO `k (b + 8)`, CSR `k (b + 4) + 4 (r + 1)`,
    bitmask `k b + n / 8`, 2:4 `n b / 2 + n / 8`. In float32 CSR is smaller than dense below half density, and a bitmask
    costs 1/32 of the dense bytes. 2:4 takes .53125 of dense in float32, .5625 in float16 and .625 in int8.
    The number says nothing about speed. BSR counts whole blocks of 4x4.
    form: the storage format.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.eye(32)
        >>> [pr.compress.stored_bytes(weight, pr.compress.StorageFormat(name)) for name in ("dense", "csr", "bitmask")]
        [4096, 388, 256]

    Use: estimating the size of a file. Avoid: predicting speed: `prunella doctor` measures it.
    """
    return encode(weight, form).nbytes


def best_format(weight: Tensor) -> StorageFormat:
    """The format with the fewest bytes; dense if none is smaller."""
    fits = [form for form in StorageFormat if form is not StorageFormat.TWO_OF_FOUR or _is_two_of_four(_matrix(weight))]
    return min(fits, key=lambda form: stored_bytes(weight, form))


# -- each format -----------------------------------------------------------------------------------------------------


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(_matrix_shape(weight.shape))


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as `(out, in)`; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


def _coo(matrix: Tensor) -> dict[str, Tensor]:
    coordinates = matrix.to_sparse(layout=torch.sparse_coo).coalesce()
    rows, cols = coordinates.indices().to(torch.int32)
    return {"values": coordinates.values(), "rows": rows.clone(), "cols": cols.clone()}


def _csr(matrix: Tensor) -> dict[str, Tensor]:
    return _compressed(_quiet(matrix.to_sparse_csr))


def _bsr(matrix: Tensor) -> dict[str, Tensor]:
    tall, wide = (-size % BLOCK for size in matrix.shape)
    padded = torch.nn.functional.pad(matrix, (0, wide, 0, tall))
    return _compressed(_quiet(lambda: padded.to_sparse_bsr((BLOCK, BLOCK))))


def _compressed(compressed: Tensor) -> dict[str, Tensor]:
    starts, cols = compressed.crow_indices().to(torch.int32), compressed.col_indices().to(torch.int32)
    return {"values": compressed.values().contiguous(), "cols": cols, "starts": starts}


def _quiet(make: Callable[[], Tensor]) -> Tensor:
    """A compressed tensor of torch, without its warning that they are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state", category=UserWarning)
        return make()


def _bitmask(matrix: Tensor) -> dict[str, Tensor]:
    nonzero = matrix != 0
    return {"values": matrix[nonzero], "bits": torch.from_numpy(np.packbits(nonzero.numpy().ravel()))}


def _is_two_of_four(matrix: Tensor) -> bool:
    return matrix.shape[1] % 4 == 0 and bool(((matrix != 0).reshape(-1, 4).sum(1) <= 2).all())


def _two_of_four(matrix: Tensor) -> dict[str, Tensor]:
    if not _is_two_of_four(matrix):
        raise RequestError("this weight is not 2:4", "four columns hold more than two values", "plan with NM(2, 4)")
    groups = matrix.reshape(-1, 4)
    # Two positions in rising order: non-zeros first, ties by position, so that zeros fill the rest.
    places = (groups == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :2].sort(1).values
    bits = torch.stack([places // 2, places % 2], -1).flatten().to(torch.uint8)
    return {"values": groups.gather(1, places), "bits": torch.from_numpy(np.packbits(bits.numpy()))}


_ENCODERS = {
    StorageFormat.DENSE: lambda matrix: {"values": matrix.clone()},
    StorageFormat.COO: _coo,
    StorageFormat.CSR: _csr,
    StorageFormat.BSR: _bsr,
    StorageFormat.BITMASK: _bitmask,
    StorageFormat.TWO_OF_FOUR: _two_of_four,
}


def _part(stored: Stored, name: str, size: int | None = None) -> Tensor:
    part = stored.parts.get(name)
    if part is None or (name == "values" and part.dtype != stored.dtype):
        raise BadInput(f"a weight in {stored.form.value} has no {name} of its type", "the parts were mixed up", "")
    if size is not None and part.numel() != size:
        raise BadInput(f"{name} of a weight in {stored.form.value} has {part.numel()} entries", f"{size} fit")
    blocks = name == "values" and stored.form in (StorageFormat.BSR, StorageFormat.DENSE, StorageFormat.TWO_OF_FOUR)
    if part.dim() != 1 and not blocks:
        raise BadInput(f"{name} of a weight in {stored.form.value} has {part.dim()} axes", "one is needed")
    if name in ("rows", "cols", "starts") and part.dtype not in (torch.int32, torch.int64):
        raise BadInput(f"{name} of a weight in {stored.form.value} are {part.dtype}", "whole numbers are needed")
    return part


def _from_coo(stored: Stored) -> Tensor:
    values = _part(stored, "values")
    indices = torch.stack([_part(stored, name, len(values)).long() for name in ("rows", "cols")])
    return _checked(
        stored,
        lambda values: torch.sparse_coo_tensor(
            indices, values, _matrix_shape(stored.shape), check_invariants=True, is_coalesced=True, device="cpu"
        ),
    )


def _from_csr(stored: Stored) -> Tensor:
    values, rows = _part(stored, "values"), _matrix_shape(stored.shape)[0]
    starts, cols = _part(stored, "starts", rows + 1), _part(stored, "cols", len(values))
    return _checked(
        stored,
        lambda values: torch.sparse_csr_tensor(
            starts.long(), cols.long(), values, _matrix_shape(stored.shape), check_invariants=True, device="cpu"
        ),
    )


def _from_bsr(stored: Stored) -> Tensor:
    values = _part(stored, "values")
    if values.dim() != 3 or tuple(values.shape[1:]) != (BLOCK, BLOCK):
        raise BadInput(f"values of a weight in bsr are not blocks of {BLOCK}x{BLOCK}", f"shape {tuple(values.shape)}")
    rows, columns = _matrix_shape(stored.shape)
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    starts, cols = _part(stored, "starts", tall + 1), _part(stored, "cols", len(values))
    full = _checked(
        stored,
        lambda values: torch.sparse_bsr_tensor(
            starts.long(), cols.long(), values, (tall * BLOCK, wide * BLOCK), check_invariants=True, device="cpu"
        ),
    )
    if bool(full[rows:].any()) or bool(full[:, columns:].any()):
        raise BadInput("a weight in bsr has values outside its shape", f"{(rows, columns)} is inside")
    return full[:rows, :columns]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Values are placed as whole numbers of their size: `to_dense` adds to zero, which changes bits of -0 and NaN."""


def _checked(stored: Stored, make: Callable[[Tensor], Tensor]) -> Tensor:
    """The dense matrix of the sparse tensor that `make` builds. Torch checks that indices are inside and ascending."""
    values = _part(stored, "values").contiguous()
    try:
        return _quiet(lambda: make(values.view(_BITS[values.element_size()]))).to_dense().view(stored.dtype)
    except (RuntimeError, IndexError) as error:
        why = str(error).strip().split("\n")[0]
        raise BadInput(f"parts of a weight in {stored.form.value} contradict each other or its shape", why) from error


def _bits(stored: Stored, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    packed = _part(stored, "bits", -(-count // 8))
    if packed.dtype != torch.uint8:
        raise BadInput(f"bits of a weight in {stored.form.value} are {packed.dtype}", "bytes are needed")
    bits = np.unpackbits(packed.numpy())
    if bits[count:].any():
        raise BadInput(f"bits of a weight in {stored.form.value} go on after the last weight", f"{count} fit")
    return bits[:count]


def _from_bitmask(stored: Stored) -> Tensor:
    matrix = torch.zeros(_matrix_shape(stored.shape), dtype=stored.dtype, device="cpu")
    some = torch.from_numpy(_bits(stored, matrix.numel())).bool().reshape(matrix.shape)
    matrix[some] = _part(stored, "values", int(some.sum()))
    return matrix


def _from_two_of_four(stored: Stored) -> Tensor:
    matrix = torch.zeros(_matrix_shape(stored.shape), dtype=stored.dtype, device="cpu")
    if matrix.shape[1] % 4:
        raise BadInput(f"a weight in 2:4 has {matrix.shape[1]} columns", "a multiple of four is needed")
    groups = matrix.numel() // 4
    bits = torch.from_numpy(_bits(stored, groups * 4)).long().reshape(groups, 2, 2)
    places = bits[..., 0] * 2 + bits[..., 1]
    if bool((places[:, 0] >= places[:, 1]).any()):
        raise BadInput("a weight in 2:4 names a position twice", "the two positions of a group ascend")
    matrix.view(-1, 4).scatter_(1, places, _part(stored, "values", groups * 2).reshape(groups, 2))
    return matrix


_DECODERS = {
    StorageFormat.DENSE: lambda stored: _part(stored, "values", math.prod(stored.shape)),
    StorageFormat.COO: _from_coo,
    StorageFormat.CSR: _from_csr,
    StorageFormat.BSR: _from_bsr,
    StorageFormat.BITMASK: _from_bitmask,
    StorageFormat.TWO_OF_FOUR: _from_two_of_four,
}
