"""Shards of a Hugging Face folder, written with one tensor in memory at a time; `io/tensor_file.py` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import write_atomic
from prunella.io.json import encode
from prunella.io.tensor_file import NAMES, StoredTensor, bytes_of

_CHUNK = 1 << 24


def shard_name(number: int, count: int) -> str:
    """`model-00001-of-00033.safetensors`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_shard(file: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> Path:
    """Write a safetensors file atomically; `StoredTensor` tensors are copied from file to file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + size_of(value)
        entries[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    header = encode(entries, indent=None, sort=False).encode()
    header += b" " * (-len(header) % 8)

    def write(path: Path) -> None:
        with path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for value in tensors.values():
                out.writelines(_chunks(value))

    return write_atomic(file, write)


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
    elif value.numel():
        yield bytes_of(value.detach().contiguous())
