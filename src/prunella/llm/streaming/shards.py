"""Shards of a Hugging Face folder, written with one tensor in memory at a time; `io/tensor_file.py` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import write_atomic
from prunella.io.tensor_file import StoredTensor
from prunella.io.tensor_writer import chunks_of, header_of

_CHUNK = 1 << 24


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
                for chunk in _chunks(value):
                    _check_no_nan(name, value.dtype, chunk)
                    out.write(chunk)

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
        yield from chunks_of(value)


def _check_no_nan(name: str, dtype: torch.dtype, chunk: bytes | memoryview) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return
    if bool(torch.frombuffer(bytearray(chunk), dtype=dtype).isnan().any()):
        raise BadInput(f"{name} holds NaN", "weights with NaN are not written", "look at the model and the data")
