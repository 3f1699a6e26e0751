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
from prunella.graph.cut.surgery import Along, Renumbered
from prunella.graph.data import Frozen
from prunella.io.nested import Packer, read_packed, unpack, write_packed
from prunella.planning.plan import Plan
from prunella.planning.table import Amount, Row
from prunella.targets import parse_target

VERSION = 1
DEEP = 2
"""The version of a plan that drops blocks, which older releases must not read as one that does not."""
_KEY = "prunella.plan"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a plan to one file, atomically. `load_plan` gives back an equal plan.

    Masks and kept units are packed to bits, cuts are int64 positions. Errors: RequestError when the recipe or the
    example holds something that is not data (a function, an open file), or when the file cannot be written.
    """
    packer = Packer()
    body = {
        "recipe": packer.pack(plan.recipe, "the plan's recipe"),
        "target": f"{plan.target.name}={plan.target.value!r}",
        "before": asdict(plan.before),
        "after": asdict(plan.after),
        "keep": {name: _bits(packer, mask) for name, mask in plan.keep.items()},
        "masks": {name: _bits(packer, mask) for name, mask in plan.masks.items()},
        "cuts": {name: {str(a): packer.tensor(i) for a, i in axes.items()} for name, axes in plan.cuts.items()},
        "attributes": [[owner, name, value] for (owner, name), value in plan.attributes.items()],
        "rows": [asdict(row) for row in plan.rows],
        "frozen": [asdict(entry) for entry in plan.frozen],
        "weights": {name: packer.tensor(value) for name, value in plan.weights.items()},
        "inputs": packer.pack(plan.inputs, "the plan's inputs"),
        "renumbered": [[list(e.inputs), [list(o) for o in e.outputs], packer.tensor(e.kept)] for e in plan.renumbered],
        "along": [[call.name, call.number, call.axis, packer.tensor(call.kept)] for call in plan.along],
        "remarks": list(plan.remarks),
        "dropped": {path: list(names) for path, names in plan.dropped.items()},
        "lists": [[owner, name, list(gone)] for (owner, name), gone in plan.lists.items()],
    }
    version = DEEP if plan.dropped else VERSION
    head = {"version": version, "sha256": _fingerprint(packer.tensors), "plan": body}
    return write_packed(path, _KEY, head, packer.tensors)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan. Errors: BadInput when the file is missing, broken, changed, no plan, or of a newer format."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"there is no plan at {file}", "no such file", "`prunella plan MODEL -o FILE` makes one")
    head, tensors = read_packed(file, _KEY, what=f"{file} is not a plan that can be read", todo="make the plan again")
    version = head.integer("version")
    if version > DEEP:
        why = f"this prunella reads up to format {DEEP}, the file has {version}"
        raise BadInput(f"{file} cannot be read", why, "update prunella, or make the plan again")
    if head.text("sha256") != _fingerprint(tensors):
        raise BadInput(f"{file} is damaged", "its contents do not have the recorded digest", "make the plan again")
    try:
        return _plan(head.section("plan").data, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadInput(f"{file} is not a sound plan", f"{type(error).__name__}: {error}", "make it again") from error


def _plan(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    return Plan(
        recipe=unpack(body["recipe"], tensors),
        target=parse_target(body["target"]),
        before=Amount(**body["before"]),
        after=Amount(**body["after"]),
        keep={name: _unbits(entry, tensors) for name, entry in body["keep"].items()},
        masks={name: _unbits(entry, tensors) for name, entry in body["masks"].items()},
        cuts={name: {int(a): tensors[i] for a, i in axes.items()} for name, axes in body["cuts"].items()},
        attributes={(owner, name): read_size(value) for owner, name, value in body["attributes"]},
        rows=tuple(Row(**row) for row in body["rows"]),
        frozen=tuple(Frozen(**entry) for entry in body["frozen"]),
        weights={name: tensors[i] for name, i in body["weights"].items()},
        inputs=unpack(body["inputs"], tensors),
        renumbered=tuple(
            Renumbered(tuple(inputs), tuple((n, a) for n, a in outputs), tensors[kept])
            for inputs, outputs, kept in body.get("renumbered", ())
        ),
        along=tuple(Along(name, number, axis, tensors[kept]) for name, number, axis, kept in body.get("along", ())),
        remarks=tuple(str(line) for line in body.get("remarks", ())),
        dropped={path: tuple(map(str, names)) for path, names in body.get("dropped", {}).items()},
        lists={(owner, name): tuple(map(int, gone)) for owner, name, gone in body.get("lists", ())},
    )


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


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
