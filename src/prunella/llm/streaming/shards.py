"""Safetensors files, tensor by tensor: read without a memory map, written with one tensor in memory at a time.

A memory map would add the size of the shards to the address space. Headers are read and checked, and each tensor is
read by a seek and a read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import plain_name, write_atomic

INDEX = "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LONGEST = 100_000_000
"""The most bytes of a header, as in the reader of safetensors."""
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Stored:
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


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder by name: of the files in its index, or of all safetensors without an index.

    Errors: BadInput for a file that is missing or damaged, or a name that two files hold.
    """
    index = folder / INDEX
    names = _listed(index) if index.is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise BadInput(f"{folder} has no safetensors weights", "no *.safetensors in it", "convert its weights first")
    tensors: dict[str, Stored] = {}
    for name in names:
        part = read_header(folder / name)
        if twice := next((key for key in part if key in tensors), None):
            raise BadInput(f"{folder} holds {twice} twice", f"once more in {name}", "leave one of the files")
        tensors |= part
    return tensors


def _listed(index: Path) -> list[str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index} cannot be read", f"{type(error).__name__}: {error}", "fetch it again") from error
    return sorted({plain_name(name) for name in listed})


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name. Errors: BadInput unless each lies in the file and has the size of its shape."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            total = file.stat().st_size
            if not 2 <= length <= min(_LONGEST, total - 8):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            entries = json.loads(opened.read(length))
            return {k: _stored(file, v, 8 + length, total) for k, v in entries.items() if k != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"truncated or damaged: {type(error).__name__}: {error}"
        raise BadInput(f"cannot read {file}", why, "fetch or write it again") from error


def _stored(file: Path, entry: Mapping[str, Any], base: int, total: int) -> Stored:
    dtype, shape = _TYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= start <= end <= total - base:
        raise ValueError("a tensor lies outside of the file")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for the shape {list(shape)} of {entry['dtype']}")
    return Stored(file, dtype, shape, base + start, end - start)


def shard_name(number: int, count: int) -> str:
    """`model-00001-of-00033.safetensors`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_shard(file: Path, tensors: Mapping[str, Tensor | Stored]) -> Path:
    """Write a safetensors file atomically; `Stored` tensors are copied from file to file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + size_of(value)
        entries[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def write(path: Path) -> None:
        with path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for value in tensors.values():
                out.writelines(_chunks(value))

    return write_atomic(file, write)


def size_of(value: Tensor | Stored) -> int:
    """Bytes of a tensor."""
    return value.size if isinstance(value, Stored) else value.numel() * value.element_size()


def _chunks(value: Tensor | Stored) -> Iterable[bytes | memoryview]:
    if isinstance(value, Stored):
        with value.file.open("rb") as source:
            source.seek(value.start)
            left = value.size
            while left:
                part = source.read(min(left, _CHUNK))
                if not part:
                    raise BadInput(f"{value.file} is cut short", "it became shorter meanwhile", "fetch it again")
                left -= len(part)
                yield part
    elif value.numel():
        yield bytes_of(value.detach().contiguous())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
