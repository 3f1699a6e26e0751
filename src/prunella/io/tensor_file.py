"""The reader of all safetensors files, tensor by tensor. The header is checked before a tensor is read.

    file = open_tensors("x.safetensors")        # BadInput unless the tensors fill the file exactly
    file.tensors["weight"].read()

It reads without a memory map, which would add the size of the file to the address space, and change with the file
under the tensors. It refuses every file that the library of the format refuses, and also duplicate names and truth
values other than 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import plain_name, reading
from prunella.io.json import LARGEST, Fields, parse, read_object
from prunella.io.kind_of_path import refuse_other_kind
from prunella.io.untrusted import check_links, check_regular

INDEX = "model.safetensors.index.json"

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in _TYPES.items()}
"""Name of each torch type in the format."""
_MOST_AXES = 64
_LARGEST_SIZE = 1 << 48
"""Largest size of an axis. A shape with a zero has no bytes, so the length of the file does not bound its sizes."""


@dataclass(frozen=True)
class StoredTensor:
    """The place of a stored tensor: `size` bytes from `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in its own memory. Errors: BadInput if the file is shorter now, or a bool is neither 0 nor 1."""
        raw = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        with reading(self.file), self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            if _fill(file, bytes_of(raw)) < self.size:
                raise BadInput(f"{self.file} is cut short", "it became shorter while it was read", "fetch it again")
        if self.dtype is torch.bool and self.size and int(raw.max()) > 1:
            raise BadInput(f"cannot read {self.file}", f"a truth value is {int(raw.max())}", "fetch or write it again")
        return raw.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """The header of a file. metadata: the texts that the writer stored with the tensors."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, one at a time."""
        return ((name, stored.read()) for name, stored in self.tensors.items())


def open_tensors(
    path: str | Path, *, what: str = "", todo: str = "fetch or write it again", give: str = "give a safetensors file"
) -> TensorFile:
    """The header of a file. what: the first line of errors, "cannot read FILE" by default. give: what to give instead
    of a file of another kind.

    Errors: BadInput unless each tensor fills its shape, and all of them fill the file exactly.
    """
    file = Path(path)
    what = what or f"cannot read {file}"
    try:
        return _opened(file, what, todo)
    except BadInput:
        refuse_other_kind(file, "safetensors", what=what, give=give)
        raise


def _opened(file: Path, what: str, todo: str) -> TensorFile:
    with reading(file, what), check_regular(file, what).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        whole = file.stat().st_size
        if not 2 <= length <= min(LARGEST, whole - 8):
            raise BadInput(what, f"truncated or damaged: a header of {length} bytes in a file of {whole}", todo)
        header = opened.read(length)
    if not header.startswith(b"{"):
        raise BadInput(what, "truncated or damaged: the header is not an object", todo)
    entries = parse(header, what, todo=todo).fields()
    texts = {key: value.text() for key, value in entries.section("__metadata__", optional=True).values()}
    stored = {k: _stored(file, v.fields(), 8 + length, whole) for k, v in entries.values() if k != "__metadata__"}
    _check_layout(stored, 8 + length, whole, what, todo)
    return TensorFile(stored, texts)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face folder by name: of the files in its index, or of all safetensors without an index.

    Errors: BadInput for a file that is missing or damaged, a name that two files hold, or a link out of the folder.
    """
    check_links(folder)
    index = folder / INDEX
    names = _listed(index) if index.is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise BadInput(f"{folder} has no safetensors weights", "no *.safetensors in it", "convert its weights first")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        part = open_tensors(folder / name).tensors
        if twice := next((key for key in part if key in tensors), None):
            raise BadInput(f"{folder} holds {twice} twice", f"once more in {name}", "leave one of the files")
        tensors |= part
    return tensors


def _listed(index: Path) -> list[str]:
    places = read_object(index, todo="fetch it again").section("weight_map")
    return sorted({plain_name(place.text()) for _, place in places.values()})


def _check_layout(tensors: Mapping[str, StoredTensor], start: int, whole: int, what: str, todo: str) -> None:
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise BadInput(what, f"truncated or damaged: tensors overlap or leave a hole at byte {end}", todo)
        end += tensor.size
    if end != whole:
        raise BadInput(what, f"truncated or damaged: {whole - end} bytes belong to no tensor", todo)


def _stored(file: Path, entry: Fields, base: int, whole: int) -> StoredTensor:
    kind, shape = entry.text("dtype"), entry.value("shape").integers(low=0, high=_LARGEST_SIZE)
    start, end = (offset.integer() for offset in entry.value("data_offsets").items(2))
    if kind not in _TYPES:
        raise entry.value("dtype").refused(f"one of {', '.join(_TYPES)}")
    if not 0 <= start <= end <= whole - base:
        raise BadInput(entry.what, f"truncated or damaged: {entry.at} lies outside of the file", entry.todo)
    if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) >= 1 << 62:
        raise entry.value("shape").refused(f"a shape of at most {_MOST_AXES} axes that a tensor can have")
    if end - start != math.prod(shape) * _TYPES[kind].itemsize:
        why = f"truncated or damaged: {entry.at} has {end - start} bytes for the shape {list(shape)} of {kind}"
        raise BadInput(entry.what, why, entry.todo)
    return StoredTensor(file, _TYPES[kind], shape, base + start, end - start)


def _fill(file: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < len(view):  # one read gives at most 2 GiB
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
