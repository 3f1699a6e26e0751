"""Nested state as tensors and JSON that refers to them by name, in one safetensors file. Data only, no pickle.

A value is an object of one key, which names its type:

    {"value": 3}    {"tensor": "t0"}    {"list": [...]}    {"tuple": [...]}    {"dict": [[key, value], ...]}

so that tuples, keys of any type and tensors are restored exactly. Version 0.1 wrote the state of tickets as
`["list", ...]` and `["dict", [key, value], ...]`, with plain values between; that is read too.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.files import write_atomic
from prunella.io.json import Fields, check_depth, check_memory, encode, parse
from prunella.io.tensor_file import open_tensors
from prunella.io.tensor_writer import save_file, size_of

VERSION = 3
"""Format 1 is that of version 0.1; format 2 had no digest."""
_KEY = "prunella.state"
_DEEPEST = 300
"""Deepest nesting of the JSON: three levels for each level of the state."""
_SEQUENCES = {"list": list, "tuple": tuple}
_MAPPINGS = {"dict": dict, "counter": Counter}


@dataclass(frozen=True)
class Packer:
    """Collects tensors for a file, and JSON that refers to them by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, value: Tensor) -> str:
        """Add a copy of a tensor; returns its name in the file."""
        name = f"t{len(self.tensors)}"
        # A clone, since safetensors refuses two names for one storage.
        self.tensors[name] = value.detach().cpu().contiguous().clone()
        return name

    def pack(self, value: Any, where: str) -> Any:
        """Data as tagged JSON. Errors: RequestError for other objects; `where` names the whole."""
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, np.integer | np.floating):
            return {"value": value.item()}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value)}
        if isinstance(value, Mapping):
            kind = "counter" if isinstance(value, Counter) else "dict"
            return {kind: [[self.pack(k, where), self.pack(v, f"{where}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.pack(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        raise RequestError(
            f"{where} cannot be written: it holds a {type(value).__name__}",
            "a file of prunella holds data: numbers, text, lists, mappings and tensors",
            "leave it out, or give a number instead",
        )


def unpack(entry: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `Packer.pack`, or what 0.1 wrote. Errors: ValueError, KeyError or TypeError for anything else."""
    if isinstance(entry, dict):
        ((kind, content),) = entry.items()
    elif isinstance(entry, list):
        kind, content = entry[0], entry[1] if entry[0] == "tensor" else entry[1:]
    else:
        kind, content = "value", entry
    return _unpacked(kind, content, tensors)


def _unpacked(kind: Any, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    if kind == "value":
        if isinstance(content, dict | list):
            raise ValueError("a value is neither a list nor an object")
        return content
    if kind == "tensor":
        return tensors[content]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](unpack(item, tensors) for item in content)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]({unpack(k, tensors): unpack(v, tensors) for k, v in content})
    raise ValueError(f"{kind!r} is not a kind of value that this prunella knows")


def equal(first: Any, second: Any) -> bool:
    """Whether two nested states are the same, tensors bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        same = isinstance(second, Mapping) and list(first) == list(second)
        return same and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        same = isinstance(second, list | tuple) and len(first) == len(second)
        return same and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


# -- files ------------------------------------------------------------------------------------------------------------


def write_packed(path: str | os.PathLike[str], key: str, head: Any, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors, and data as the entry `key` of the header, to one file, atomically.

    Keys keep their order. Errors: as `write_atomic`, and RequestError for data nested too deeply to be read back.
    """
    try:
        check_depth(head, _DEEPEST)
        metadata = {key: encode(head, indent=None, allow_nan=True, sort=False)}
        check_memory(metadata[key])
    except ValueError as error:
        raise RequestError(f"cannot write {os.fspath(path)}", str(error), "make it flatter, or smaller") from error
    size = size_of(tensors) + sum(map(len, metadata.values()))
    return write_atomic(path, lambda file: save_file(dict(tensors), file, metadata=metadata), size=size)


def read_packed(
    path: str | os.PathLike[str], key: str, *, what: str, todo: str, give: str = "give another", allow_nan: bool = False
) -> tuple[Fields, dict[str, Tensor]]:
    """Read a file of `write_packed`. Errors: BadInput when the file is broken or has no such entry."""
    file = open_tensors(os.fspath(path), what=what, todo=todo, give=give)
    head = file.metadata.get(key)
    if head is None:
        raise BadInput(what, f"it is a safetensors file without {key!r}", give)
    return parse(head, what, todo=todo, allow_nan=allow_nan, deepest=_DEEPEST).fields(), dict(file.read())


def save_state(state: Any, path: str | os.PathLike[str]) -> Path:
    """Write nested dicts, lists, tuples, numbers, texts and tensors to one file, atomically, bit for bit.

    Errors: RequestError when something in it is not data.
    """
    packer = Packer()
    entry = packer.pack(state, "state")
    head = {"version": VERSION, "state": entry, "sha256": fingerprint(packer.tensors, entry)}
    return write_packed(path, _KEY, head, packer.tensors)


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read what `save_state` wrote. Errors: BadInput when the file is missing, broken, or no such state."""
    what, todo = f"{path} is not a sound state", "remove the file to make it again"
    head, tensors = read_packed(path, _KEY, what=what, todo=todo, allow_nan=True)
    version, body = head.integer("version", low=1, high=VERSION), head.value("state").data
    if (version > 2 or "sha256" in head) and head.text("sha256") != fingerprint(tensors, body):
        raise BadInput(what, "damaged: its contents do not have the recorded digest", todo)
    try:
        return unpack(body, tensors)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadInput(what, f"{type(error).__name__}: {error}", todo) from error


def fingerprint(tensors: Mapping[str, Tensor], body: Any) -> str:
    """The digest of the contents of a file of `write_packed`; of the tensors alone if `body` is None."""
    state = hashlib.sha256(encode(body, indent=None, allow_nan=True).encode() if body is not None else b"")
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
