"""A plan as one safetensors file: tensors as tensors, everything else as JSON in the header. Data only, no pickle."""

from __future__ import annotations

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
from prunella.io.kind_of_path import described_path
from prunella.io.nested import Packer, fingerprint, read_packed, unpack, write_packed
from prunella.io.record import read_record
from prunella.planning.accounting import Amount, Row
from prunella.planning.plan import Plan
from prunella.planning.recipe import current_names
from prunella.targets import parse_target

VERSION = 5
"""Version of the format. 1 and 2 are of prunella 0.1 and are read: 2 adds dropped blocks. 3 has one example and no
caveats. 4 does not store how many calls of a name a run has."""
_FIRST_WITH_DIGEST = 3
"""Formats 1 and 2 had a digest of the tensors alone."""
_KEY = "prunella.plan"
_LARGEST_SIZE = 1 << 48
_GIVE = "`prunella plan MODEL -o FILE` makes one"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a plan to one file, atomically. `load_plan` gives back an equal plan.

    Masks and kept units are packed to bits, cuts are int64 positions. Errors: RequestError when the recipe or the
    example holds something that is not data (a function, an open file), or when the file cannot be written.
    """
    packer = Packer()
    body = {
        "recipe": packer.pack(plan.recipe, "the plan's recipe"),
        "target": plan.target.exact if plan.target else None,
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
        "caveats": list(plan.caveats),
    }
    head = {"version": VERSION, "sha256": fingerprint(packer.tensors, body), "plan": body}
    return write_packed(path, _KEY, head, packer.tensors)


def _pack_changes(changes: Changes, packer: Packer) -> dict[str, Any]:
    return {
        "cuts": {name: {str(a): packer.tensor(i) for a, i in axes.items()} for name, axes in changes.cuts.items()},
        "attributes": [[owner, name, value] for (owner, name), value in changes.attributes.items()],
        "along": [[c.name, c.number, c.axis, packer.tensor(c.kept), c.example, c.calls] for c in changes.along],
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
        raise BadInput(f"there is no plan at {file}", described_path(file), _GIVE)
    what = f"{file} is not a plan that can be read"
    head, tensors = read_packed(file, _KEY, what=what, todo="make the plan again", give=_GIVE)
    version = head.integer("version")
    if version not in range(1, VERSION + 1):
        why = f"this prunella reads up to format {VERSION}, the file has {version}"
        raise BadInput(f"{file} cannot be read", why, "update prunella, or make the plan again")
    data = head.section("plan").data
    told = version >= _FIRST_WITH_DIGEST
    if head.text("sha256") != fingerprint(tensors, data if told else None):
        raise BadInput(f"{file} is damaged", "its contents do not have the recorded digest", "make the plan again")
    try:
        return _plan(data if told else _of_0_1(data), tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise BadInput(f"{file} is not a sound plan", f"{type(error).__name__}: {error}", "make it again") from error


def _of_0_1(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body of format 1 or 2 as one of format 3: one entry `changes`, and the present names of a recipe's numbers.

    Those formats stored an invented target for plans without a recipe; it is dropped.
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
        recipe=_recipe(unpack(body["recipe"], tensors)),
        target=None if body["target"] is None else parse_target(body["target"]),
        before=read_record(Amount, body["before"]),
        after=read_record(Amount, body["after"]),
        keep={name: _unbits(entry, tensors) for name, entry in body["keep"].items()},
        masks={name: _unbits(entry, tensors) for name, entry in body["masks"].items()},
        changes=_changes(body["changes"], tensors),
        rows=tuple(read_record(Row, row) for row in body["rows"]),
        frozen=tuple(map(_frozen, body["frozen"])),
        weights={name: tensors[i] for name, i in body["weights"].items()},
        inputs=unpack(body["inputs"], tensors),
        others=_examples(unpack(body["others"], tensors)) if "others" in body else (),
        remarks=tuple(map(_text, body.get("remarks", ()))),
        caveats=tuple(map(_text, body.get("caveats", ()))),
    )


def _recipe(recipe: Any) -> dict[str, Any]:
    """A recipe in the form of `Recipe.describe`; empty for a plan made by hand."""
    if not isinstance(recipe, dict):
        raise ValueError("a recipe is a mapping")
    if type(recipe.get("round_to", 1)) is not int or not isinstance(recipe.get("granularity", ()), list | tuple):
        raise ValueError("round_to is a whole number, and granularity a list")
    whole = {"criterion", "granularity", "allocation"} <= recipe.keys()
    for part in (recipe["criterion"], recipe["allocation"], *recipe["granularity"]) if whole else ():
        if not isinstance(part, dict) or not isinstance(part["name"], str) or not isinstance(part["knobs"], dict):
            raise ValueError("a part of a recipe has a name and knobs")
    return recipe


def _examples(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("the further examples are a list")
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not text")
    return value


def _positions(tensor: Tensor) -> Tensor:
    """Kept positions of an axis, in order, each once."""
    if tensor.dtype is not torch.int64 or tensor.dim() != 1:
        raise ValueError(f"positions are {tensor.dtype} of {tensor.dim()} axes")
    if tensor.numel() and (int(tensor[0]) < 0 or not bool((tensor[1:] > tensor[:-1]).all())):
        raise ValueError("positions do not rise from 0")
    return tensor


def _changes(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Changes:
    return Changes(
        cuts={name: {int(a): _positions(tensors[i]) for a, i in axes.items()} for name, axes in body["cuts"].items()},
        attributes={(_text(owner), _text(name)): read_size(value) for owner, name, value in body["attributes"]},
        along=tuple(_along(entry, tensors) for entry in body["along"]),
        renumbered=tuple(
            Renumbered(tuple(map(int, inputs)), tuple((int(n), int(a)) for n, a in outputs), _positions(tensors[kept]))
            for inputs, outputs, kept in body["renumbered"]
        ),
        dropped={path: tuple(map(_text, names)) for path, names in body["dropped"].items()},
        lists={(_text(owner), _text(name)): tuple(map(int, positions)) for owner, name, positions in body["lists"]},
    )


def _along(entry: list[Any], tensors: Mapping[str, Tensor]) -> Along:
    """A restricted call; formats 1 to 3 store the calls of one example only, format 4 not how many there are."""
    name, number, axis, kept, *further = entry
    return Along(_text(name), int(number), int(axis), _positions(tensors[kept]), *map(int, further))


def _frozen(entry: Mapping[str, Any]) -> Frozen:
    """A frozen entry; formats 1 and 2 do not store the kind of its reason."""
    return read_record(Frozen, {"kind": ReasonKind.OPERATION.value, **entry})


def read_size(value: Any) -> int | tuple[int, ...]:
    """The value of an attribute from JSON: one or several possible sizes of an axis. Errors: ValueError."""
    sizes = value if isinstance(value, list) else [value]
    if not all(type(size) is int and abs(size) < _LARGEST_SIZE for size in sizes):
        raise ValueError(f"{value!r:.40} is not a size")
    return tuple(sizes) if isinstance(value, list) else sizes[0]


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
