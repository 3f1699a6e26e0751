"""Safetensors files, tensor by tensor: read without a memory map, written with one tensor in memory at a time.

A memory map would add the size of the shards to the address space. Headers are read and checked, and each tensor is
read by a seek and a read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import plain_name, reading, write_atomic
from prunella.io.json import LARGEST, Fields, parse, read_object
from prunella.io.tensor_file import DTYPES, bytes_of, header_of, pieces_of

INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `size` bytes from `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Errors: BadInput when the file is shorter than it was."""
        raw = torch.empty(self.size, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            if _fill(file, bytes_of(raw)) < self.size:
                raise BadInput(f"{self.file} is cut short", "it became shorter while it was read", "fetch it again")
        return raw.view(self.dtype).reshape(self.shape)


def _fill(file: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < len(view):  # one read gives at most 2 GiB
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face folder by name: of the files in its index, or of all safetensors without an index.

    Errors: BadInput for a file that is missing or damaged, or a name that two files hold.
    """
    index = folder / INDEX
    names = _listed(index) if index.is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise BadInput(f"{folder} has no safetensors weights", "no *.safetensors in it", "convert its weights first")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        part = read_header(folder / name)
        if twice := next((key for key in part if key in tensors), None):
            raise BadInput(f"{folder} holds {twice} twice", f"once more in {name}", "leave one of the files")
        tensors |= part
    return tensors


def _listed(index: Path) -> list[str]:
    places = read_object(index, todo="fetch it again").section("weight_map")
    return sorted({plain_name(place.text()) for _, place in places.values()})


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Errors: BadInput unless each fills its shape, and all fill the file exactly."""
    what, todo = f"cannot read {file}", "fetch or write it again"
    with reading(file), file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        whole = file.stat().st_size
        if not 2 <= length <= min(LARGEST, whole - 8):
            raise BadInput(what, f"truncated or damaged: a header of {length} bytes in a file of {whole}", todo)
        header = opened.read(length)
    entries = parse(header, what, todo=todo).fields()
    tensors = {k: _stored(file, v.fields(), 8 + length, whole) for k, v in entries.values() if k != "__metadata__"}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise BadInput(what, f"truncated or damaged: tensors overlap or leave a hole at byte {end}", todo)
        end += tensor.size
    if end != whole:
        raise BadInput(what, f"truncated or damaged: {whole - end} bytes belong to no tensor", todo)
    return tensors


def _stored(file: Path, entry: Fields, base: int, whole: int) -> StoredTensor:
    kind, shape = entry.text("dtype"), entry.value("shape").integers(low=0)
    start, end = (offset.integer() for offset in entry.value("data_offsets").items(2))
    if kind not in DTYPES:
        raise entry.value("dtype").refused(f"one of {', '.join(DTYPES)}")
    if not 0 <= start <= end <= whole - base:
        raise BadInput(entry.what, f"truncated or damaged: {entry.at} lies outside of the file", entry.todo)
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        why = f"truncated or damaged: {entry.at} has {end - start} bytes for the shape {list(shape)} of {kind}"
        raise BadInput(entry.what, why, entry.todo)
    return StoredTensor(file, DTYPES[kind], shape, base + start, end - start)


def shard_name(number: int, count: int) -> str:
    """`model-00001-of-00033.safetensors`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_shard(file: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> Path:
    """Write a safetensors file atomically; `StoredTensor` tensors are copied from file to file.

    Errors: BadInput for NaN, wherever it comes from.
    """
    described = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    header = header_of(described, {"format": "pt"})

    def write(path: Path) -> None:
        with path.open("wb") as out:
            out.write(header)
            for name, value in tensors.items():
                for piece in _chunks(value):
                    _check_no_nan(name, value.dtype, piece)
                    out.write(piece)

    return write_atomic(file, write, size=len(header) + sum(map(size_of, tensors.values())))


def size_of(value: Tensor | StoredTensor) -> int:
    """Bytes of a tensor."""
    return value.size if isinstance(value, StoredTensor) else value.numel() * value.element_size()


def _chunks(value: Tensor | StoredTensor) -> Iterable[bytes | memoryview]:
    if isinstance(value, StoredTensor):
        with value.file.open("rb") as source:
            source.seek(value.start)
            left = value.size
            while left:
                part = source.read(min(left, _CHUNK))
                if not part:
                    raise BadInput(f"{value.file} is cut short", "it became shorter meanwhile", "fetch it again")
                left -= len(part)
                yield part
    else:
        yield from pieces_of(value)


def _check_no_nan(name: str, dtype: torch.dtype, piece: bytes | memoryview) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return
    if bool(torch.frombuffer(bytearray(piece), dtype=dtype).isnan().any()):
        raise BadInput(f"{name} holds NaN", "weights with NaN are not written", "look at the model and the data")
