"""A plan as one safetensors file: tensors as tensors, everything else as JSON in the header. Data only, no pickle."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.graph.cut.changes import Along, Changes, Renumbered
from prunella.graph.data import Frozen, ReasonKind
from prunella.io.json import encode
from prunella.io.nested import Packer, read_packed, unpack, write_packed
from prunella.planning.accounting import Amount, Row
from prunella.planning.plan import Plan
from prunella.planning.recipe import current_names
from prunella.targets import parse_target

VERSION = 4
"""Of the format. 1 and 2, written by 0.1, are read: 2 is 1 with blocks that are dropped. 3 has one example."""
_FIRST_WITH_DIGEST = 3
"""Formats 1 and 2 had a digest of the tensors alone."""
_KEY = "prunella.plan"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a plan to one file, atomically. `load_plan` gives back an equal plan.

    Masks and kept units are packed to bits, cuts are int64 positions. Errors: RequestError when the recipe or the
    example holds something that is not data (a function, an open file), or when the file cannot be written.
    """
    packer = Packer()
    body = {
        "recipe": packer.pack(plan.recipe, "the plan's recipe"),
        "target": f"{plan.target.name}={plan.target.value!r}" if plan.target else None,
        "before": asdict(plan.before),
        "after": asdict(plan.after),
        "keep": {name: _bits(packer, mask) for name, mask in plan.keep.items()},
        "masks": {name: _bits(packer, mask) for name, mask in plan.masks.items()},
        "changes": _pack_changes(plan.changes, packer),
        "rows": [asdict(row) for row in plan.rows],
        "frozen": [asdict(entry) for entry in plan.frozen],
        "weights": {name: packer.tensor(value) for name, value in plan.weights.items()},
        "inputs": packer.pack(plan.inputs, "the plan's inputs"),
        "others": packer.pack(plan.others, "the plan's inputs"),
        "remarks": list(plan.remarks),
    }
    head = {"version": VERSION, "sha256": _fingerprint(packer.tensors, body), "plan": body}
    return write_packed(path, _KEY, head, packer.tensors)


def _pack_changes(changes: Changes, packer: Packer) -> dict[str, Any]:
    return {
        "cuts": {name: {str(a): packer.tensor(i) for a, i in axes.items()} for name, axes in changes.cuts.items()},
        "attributes": [[owner, name, value] for (owner, name), value in changes.attributes.items()],
        "along": [[c.name, c.number, c.axis, packer.tensor(c.kept), c.example] for c in changes.along],
        "renumbered": [
            [list(e.inputs), [list(o) for o in e.outputs], packer.tensor(e.kept)] for e in changes.renumbered
        ],
        "dropped": {path: list(names) for path, names in changes.dropped.items()},
        "lists": [[owner, name, list(positions)] for (owner, name), positions in changes.lists.items()],
    }


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan. Errors: BadInput when the file is missing, broken, changed, no plan, or of a newer format."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"there is no plan at {file}", "no such file", "`prunella plan MODEL -o FILE` makes one")
    head, tensors = read_packed(file, _KEY, what=f"{file} is not a plan that can be read", todo="make the plan again")
    version = head.integer("version")
    if version not in range(1, VERSION + 1):
        why = f"this prunella reads up to format {VERSION}, the file has {version}"
        raise BadInput(f"{file} cannot be read", why, "update prunella, or make the plan again")
    data = head.section("plan").data
    told = version >= _FIRST_WITH_DIGEST
    if head.text("sha256") != _fingerprint(tensors, data if told else None):
        raise BadInput(f"{file} is damaged", "its contents do not have the recorded digest", "make the plan again")
    try:
        return _plan(data if told else _of_0_1(data), tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadInput(f"{file} is not a sound plan", f"{type(error).__name__}: {error}", "make it again") from error


def _of_0_1(body: Mapping[str, Any]) -> dict[str, Any]:
    """What format 1 or 2 holds, as format 3 does: changes in one place, today's names of a recipe's numbers.

    What a plan by hand asked for was made up from what it gave.
    """
    names = ("cuts", "attributes", "along", "renumbered", "dropped", "lists")
    absent: dict[str, Any] = {"along": [], "renumbered": [], "dropped": {}, "lists": []}
    changes = absent | {name: body[name] for name in names if name in body}
    recipe = current_names({key["value"]: value for key, value in body["recipe"]["dict"]})
    return {
        **{name: value for name, value in body.items() if name not in names},
        "changes": changes,
        "recipe": {"dict": [[{"value": name}, value] for name, value in recipe.items()]},
        "target": body["target"] if recipe else None,
    }


def _plan(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    return Plan(
        recipe=unpack(body["recipe"], tensors),
        target=None if body["target"] is None else parse_target(body["target"]),
        before=Amount(**body["before"]),
        after=Amount(**body["after"]),
        keep={name: _unbits(entry, tensors) for name, entry in body["keep"].items()},
        masks={name: _unbits(entry, tensors) for name, entry in body["masks"].items()},
        changes=_changes(body["changes"], tensors),
        rows=tuple(Row(**row) for row in body["rows"]),
        frozen=tuple(map(_frozen, body["frozen"])),
        weights={name: tensors[i] for name, i in body["weights"].items()},
        inputs=unpack(body["inputs"], tensors),
        others=unpack(body["others"], tensors) if "others" in body else (),
        remarks=tuple(str(line) for line in body.get("remarks", ())),
    )


def _changes(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Changes:
    return Changes(
        cuts={name: {int(a): tensors[i] for a, i in axes.items()} for name, axes in body["cuts"].items()},
        attributes={(owner, name): read_size(value) for owner, name, value in body["attributes"]},
        along=tuple(_along(entry, tensors) for entry in body["along"]),
        renumbered=tuple(
            Renumbered(tuple(inputs), tuple((n, a) for n, a in outputs), tensors[kept])
            for inputs, outputs, kept in body["renumbered"]
        ),
        dropped={path: tuple(map(str, names)) for path, names in body["dropped"].items()},
        lists={(owner, name): tuple(map(int, positions)) for owner, name, positions in body["lists"]},
    )


def _along(entry: list[Any], tensors: Mapping[str, Tensor]) -> Along:
    """Formats 1 to 3 know the calls of one example only."""
    name, number, axis, kept, *example = entry
    return Along(name, number, axis, tensors[kept], *map(int, example))


def _frozen(entry: Mapping[str, Any]) -> Frozen:
    """Format 1 and 2 do not say what kind of reason it is."""
    return Frozen(**{**entry, "kind": ReasonKind(entry.get("kind", ReasonKind.OPERATION))})


def read_size(value: Any) -> int | tuple[int, ...]:
    """The value of an attribute, as JSON has it."""
    return tuple(int(item) for item in value) if isinstance(value, list) else int(value)


def _bits(packer: Packer, mask: Tensor) -> dict[str, Any]:
    packed = np.packbits(mask.detach().cpu().numpy().astype(bool).reshape(-1))
    return {"shape": list(mask.shape), "bits": packer.tensor(torch.from_numpy(packed))}


def _unbits(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    shape = tuple(int(n) for n in entry["shape"])
    packed, count = tensors[entry["bits"]].numpy(), math.prod(shape)
    if min(shape, default=0) < 0 or len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes of bits for the shape {list(shape)}")
    flat = np.unpackbits(packed, count=count)
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def _fingerprint(tensors: Mapping[str, Tensor], body: Mapping[str, Any] | None) -> str:
    """The digest of all that a plan file says; formats 1 and 2 had one of the tensors alone."""
    state = hashlib.sha256(encode(body, indent=None).encode() if body is not None else b"")
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
