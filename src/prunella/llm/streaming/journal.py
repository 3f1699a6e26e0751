"""What of a run is done, on disk: a killed run goes on, and another run does not go on in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunella._version import __version__
from prunella.errors import BadInput, RequestError
from prunella.io.files import write_atomic
from prunella.io.load import import_transformers
from prunella.llm.recipe import OneShot
from prunella.llm.solve_block import Fit
from prunella.model.forward import tensors
from prunella.registry.serialize import describe


class Journal:
    """Blocks that are done, with their fits. Written whole after each, so that a reader never sees half an entry."""

    def __init__(self, file: Path, asked: str) -> None:
        self._file, self._asked, self._done = file, asked, dict[str, Any]()
        if not file.is_file():
            return
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
            found, self._done = entry["asked"], {k: [Fit(**fit) for fit in v] for k, v in entry["done"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{file} is damaged", f"{type(error).__name__}: {error}", "remove the folder") from error
        if found != asked:
            why = "its model, data, recipe, number of processes or threads, or a version was another"
            raise RequestError(f"the run in {file.parent.parent} is not continued", why, "choose another folder")

    def fits(self, path: str) -> list[Fit] | None:
        """What was done to a block, None if it is not done."""
        return self._done.get(path)

    def add(self, path: str, fits: Sequence[Fit]) -> None:
        """A block is done; its shard is on the disk."""
        self._done[path] = list(fits)
        done = {key: [asdict(fit) for fit in some] for key, some in self._done.items()}
        write_atomic(self._file, json.dumps({"asked": self._asked, "done": done}).encode())


def fingerprint(source: Path, data: Sequence[Any], how: OneShot, count: int, skip: Sequence[str]) -> str:
    """The digest of all that the result depends on; of the weights their headers, sizes and times of change."""
    state = hashlib.sha256()
    for file in sorted([*source.glob("*.safetensors"), *source.glob("*.json")]):
        known = file.stat()
        state.update(f"{file.name} {known.st_size} {known.st_mtime_ns}".encode())
        state.update(file.read_bytes() if file.suffix == ".json" else _head(file))
    for tensor in tensors(list(data)):
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    versions = [__version__, torch.__version__, import_transformers().__version__]
    rest = [described(how), versions, count, torch.get_num_threads(), list(skip)]
    state.update(json.dumps(rest, sort_keys=True).encode())
    return state.hexdigest()


def described(value: Any) -> Any:
    """A recipe as plain data, functions by their names and knobs."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{f.name: described(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if callable(value):
        bound = value.keywords if isinstance(value, partial) else {}
        return {"name": describe(value)["name"], "knobs": {**describe(value)["knobs"], **described(bound)}}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(min(1 << 20, 8 + int.from_bytes(opened.read(8), "little")))
