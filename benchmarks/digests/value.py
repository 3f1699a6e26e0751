"""SHA-256 of a result: tensors by their bytes, models by state and masks, plans by what they decide; no words."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

import prunella as pr

LEFT_OUT = frozenset({"seconds", "model_weights", "example"})
"""Fields of records: seconds are of the machine, and others came after the first record was made."""


def digest(value: Any) -> str:
    """64 hexadecimal digits that are equal for equal results. TypeError for a type that it does not know."""
    return hashlib.sha256(_bytes(value)).hexdigest()


def plan_parts(plan: pr.Plan) -> dict[str, Any]:
    """What a plan decides, by name: never its reasons and remarks, which are words."""
    changes = plan.changes
    structure = [changes.cuts, changes.attributes, changes.along, changes.renumbered, changes.dropped, changes.lists]
    return {
        "keep": plan.keep,
        "masks": plan.masks,
        "weights": plan.weights,
        "structure": structure,
        "got": [plan.target.value if plan.target else plan.got, plan.got, plan.before, plan.after],
        "rows": sorted((row.name, *_numbers(row)) for row in plan.rows),
        "frozen": sorted((place.entity, *_numbers(place)) for place in plan.frozen),
    }


def _numbers(record: Any) -> tuple[Number, ...]:
    values = (getattr(record, field.name) for field in dataclasses.fields(record))
    return tuple(value for value in values if isinstance(value, Number))


def _bytes(value: Any) -> bytes:
    """A value as bytes from which it could be told apart from all others of its kind."""
    kind, write = next(((kind, write) for kind, write in _WRITERS if isinstance(value, kind)), (None, None))
    if write is None or kind is None:
        if dataclasses.is_dataclass(value):
            return _record(value)
        raise TypeError(f"no digest of {type(value).__name__}")
    return write(value)


def _join(tag: str, parts: Sequence[bytes]) -> bytes:
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    return tag.encode() + struct.pack("<q", len(parts)) + digests


def _tensor(value: Tensor) -> bytes:
    plain = value.detach().resolve_conj().resolve_neg().to_dense().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return f"tensor {plain.dtype} {tuple(plain.shape)} ".encode() + data


def _mapping(value: Mapping[Any, Any]) -> bytes:
    return _join("mapping", sorted(_bytes(key) + _bytes(item) for key, item in value.items()))


def _model(model: nn.Module) -> bytes:
    return _join("model", [_mapping(model.state_dict()), _mapping(pr.masks_of(model))])


def _record(value: Any) -> bytes:
    """The numbers and tensors in a frozen value, whatever its fields are called; but none of `LEFT_OUT`."""
    fields = [field.name for field in dataclasses.fields(value) if field.name not in LEFT_OUT]
    held = [getattr(value, name) for name in fields]
    return _join("record", sorted(_bytes(one) for one in held if not _is_words(one)))


def _is_words(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, str | Enum) or (callable(value) and not isinstance(value, nn.Module))


_WRITERS: tuple[tuple[Any, Callable[[Any], bytes]], ...] = (
    (Tensor, _tensor),
    (nn.Module, _model),
    (pr.Plan, lambda plan: _mapping(plan_parts(plan))),
    (Enum, lambda one: _bytes(one.value)),
    (type(None), lambda _: b"none"),
    (bool, lambda flag: b"bool 1" if flag else b"bool 0"),
    (int, lambda number: b"int %d" % number),
    (float, lambda number: b"float " + struct.pack("<d", number)),
    (str, lambda text: b"str " + text.encode()),
    (bytes, lambda data: b"bytes " + data),
    (Mapping, _mapping),
    (Set, lambda some: _join("set", sorted(map(_bytes, some)))),
    (tuple | list, lambda some: _join("sequence", list(map(_bytes, some)))),
)
