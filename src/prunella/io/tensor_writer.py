"""Write a safetensors file chunk by chunk, into the given file.

The writer of safetensors makes its own temporary file, which a kill leaves behind, and sets its own mode. Tensors are
in the order of safetensors: by the size of their type, the largest first, then by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunella.errors import NotSupported
from prunella.io.tensor_file import NAMES, bytes_of

_CHUNK = 1 << 24


def save_file(
    tensors: Mapping[str, Tensor], file: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to `file`. Errors: NotSupported for a type that safetensors does not know."""
    ordered = {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))}
    header = header_of({name: (value.dtype, tuple(value.shape)) for name, value in ordered.items()}, metadata)
    with Path(file).open("wb") as out:
        out.write(header)
        for value in ordered.values():
            for chunk in chunks_of(value):
                out.write(chunk)


def header_of(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """The head of a file with these tensors in this order: its length, and JSON padded with spaces."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _name_of(name, dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def chunks_of(tensor: Tensor) -> Iterable[memoryview]:
    """The bytes of a tensor in chunks."""
    if tensor.numel():
        view = bytes_of(tensor.detach().cpu().contiguous())
        yield from (view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK))


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all these tensors."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _name_of(name: str, dtype: torch.dtype) -> str:
    known = NAMES.get(dtype)
    if known is None:
        raise NotSupported(f"{name} cannot be written", f"safetensors has no {dtype}", "convert it first")
    return known
