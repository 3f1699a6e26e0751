"""Nested state as one safetensors file: tensors as tensors, the rest as JSON in the header. Data only, no pickle."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.files import write_atomic

VERSION = 1
_KEY = "prunella.state"


def save_state(state: Any, path: str | os.PathLike[str]) -> Path:
    """Write nested dicts, lists, tuples, numbers, texts and tensors to one file, atomically, bit for bit.

    Errors: RequestError when something in it is not data.
    """
    tensors: dict[str, Tensor] = {}
    head = json.dumps({"version": VERSION, "state": _pack(state, tensors, "state")})
    return write_atomic(path, lambda file: save_file(tensors, file, metadata={_KEY: head}))


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read what `save_state` wrote. Errors: BadInput when the file is missing, broken, or no such state."""
    try:
        with safe_open(str(path), framework="pt") as file:
            head = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if head["version"] != VERSION:
            raise BadInput(f"{path} cannot be read", f"its format is {head['version']}, not {VERSION}")
        return _unpack(head["state"], tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path} is no sound state", why, "remove the file to make it again") from error


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Plain JSON: lists as `["list", ...]`, tuples and dicts likewise, tensors as `["tensor", name]`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return ["tensor", name]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value))]
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return [kind, *([_pack(k, tensors, where), _pack(v, tensors, f"{where}.{k}")] for k, v in value.items())]
    raise RequestError(
        f"{where} is of type {type(value).__name__}, which cannot be saved",
        "a run that resumes keeps numbers, texts and tensors only",
        "leave it out of state_dict(), or save a number instead",
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "tensor":
        return tensors[items[0]]
    if kind in ("list", "tuple"):
        found = [_unpack(item, tensors) for item in items]
        return found if kind == "list" else tuple(found)
    if kind in ("dict", "counter"):
        pairs = {_unpack(k, tensors): _unpack(v, tensors) for k, v in items}
        return Counter(pairs) if kind == "counter" else pairs
    raise BadInput(f"a state holds {kind!r}", "this prunella does not know it")


def equal(first: Any, second: Any) -> bool:
    """Whether two nested states are the same, tensors bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return isinstance(second, Mapping) and list(first) == list(second) and all(
            equal(first[key], second[key]) for key in first
        )  # fmt: skip
    if isinstance(first, list | tuple):
        return isinstance(second, list | tuple) and len(first) == len(second) and all(
            equal(a, b) for a, b in zip(first, second, strict=True)
        )  # fmt: skip
    return bool(first == second)
