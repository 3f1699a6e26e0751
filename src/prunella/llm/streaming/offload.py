"""Hidden states between two blocks on disk, one tensor per batch, read back one by one."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from prunella.io.tensor_file import bytes_of
from prunella.llm.blocks import StoredTensors


class OnDisk(StoredTensors):
    """Tensors in a temporary file without a name, which is deleted with this object or its process.

    Each is read when it is indexed, into memory of its own: a mapped file would count as address space, and its tensors
    would not be aligned like those of a run in memory.
    """

    def __init__(self, tensors: Iterable[Tensor], folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, torch.dtype, torch.Size]] = []
        for tensor in tensors:
            self._places.append((self._file.tell(), tensor.dtype, tensor.shape))
            view = bytes_of(tensor.detach().contiguous())
            while view:
                view = view[self._file.write(view) :]
        super().__init__(len(self._places))

    def read(self, k: int) -> Tensor:
        start, dtype, shape = self._places[k]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        view = bytes_of(tensor)
        self._file.seek(start)
        while view:
            view = view[self._file.readinto(view) :]  # type: ignore[attr-defined]
        return tensor
