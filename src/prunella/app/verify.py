"""Verify a folder that `run` wrote: its files are complete, its model loads, and it is the model of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.app.record import read_record
from prunella.errors import BadInput, CheckFailed
from prunella.graph.verify import relative_error
from prunella.io.artifact import PLAN, check_weights, load
from prunella.io.files import MARKER
from prunella.io.identity import weights_digest
from prunella.io.manifest import check_files, read_manifest
from prunella.io.origin import Factory
from prunella.io.plan_file import load_plan
from prunella.model.forward import outputs_of
from prunella.model.state import mode
from prunella.planning.plan import Plan
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink
from prunella.types import Inputs

TOLERANCE = 1e-4
"""Largest relative difference between the stored model and the masked one, in the precision of the weights."""


@dataclass(frozen=True)
class Verified:
    """The result of the checks. `equal`: relative difference to the masked dense model, None if not compared.

    recovered: the steps of recovery after the cut; the model then need not equal the masked one.
    """

    folder: str
    files: int
    rebuilt: bool
    recovered: tuple[str, ...] = ()
    equal: float | None = None
    reader: str = "prunella.load"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.files} files are as they were written"]
        if self.reader == "from_pretrained":
            lines.append("plain from_pretrained builds the model")
        else:
            built = "the model loads, and its weights are finite"
            lines.append(built if self.rebuilt else "not rebuilt: give its MODEL")
        if self.equal is not None and self.recovered:
            lines.append("the cut equals the masked dense model")
            lines.append(f"then recovered by {', '.join(self.recovered)}: the record has the quality before and after")
        elif self.equal is not None:
            lines.append(f"it equals the masked dense model: relative difference {self.equal:.1e}")
        return "\n".join(lines)


def check_folder(folder: Path, *, factory: Factory | None = None) -> tuple[Verified, nn.Module | None]:
    """Compare all digests and build the model. Without a `factory` a model that needs one is not built.

    A folder of `prunella llm` has no manifest: its record lists the files, and plain `from_pretrained` builds the
    model. Errors: BadInput for a file that is missing, changed or does not fit.
    """
    if not (folder / MARKER).is_file() and (record := read_record(folder)) is not None and "files" in record:
        check_files(folder, record)
        return Verified(str(folder), len(record.section("files").data), rebuilt=False, reader="from_pretrained"), None
    manifest = read_manifest(folder)
    check_weights(folder, manifest)
    needs = manifest.section("origin").text("kind") in ("factory", "unknown")
    verified = Verified(str(folder), len(manifest.section("files").data), rebuilt=False, recovered=_recovered(folder))
    if needs and factory is None:
        return verified, None
    small = load(folder, factory=factory if needs else None)
    for name, tensor in small.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"the model in {folder} is not finite", f"{name} holds NaN or infinity", "make it again")
    return replace(verified, rebuilt=True), small


def plan_of(folder: Path) -> Plan:
    """The plan stored in the folder."""
    return load_plan(folder / PLAN)


def check_equal(verified: Verified, small: nn.Module, dense: nn.Module, plan: Plan, inputs: Inputs) -> Verified:
    """Cut `dense` by the plan again (compared in float64 with the masked model) and compare with the stored model.

    Errors: CheckFailed if shapes differ, or if outputs differ although the model was not recovered.
    """
    if verified.recovered:
        _same_dense(Path(verified.folder), dense)
    expected = shrink(dense, plan, inputs=inputs) if plan.changes else apply_(dense, plan)
    _same_shapes(expected.state_dict(), small.state_dict())
    with torch.no_grad(), mode(expected, training=False), mode(small, training=False):
        error = relative_error(outputs_of(expected, inputs), outputs_of(small, inputs))
    if error > TOLERANCE and not verified.recovered:
        why = f"its output differs by {error:.1e} of the largest value; {TOLERANCE:.0e} is allowed"
        raise CheckFailed(
            "the stored model is not the masked dense model", why, "check that MODEL is the dense model of this run"
        )
    return replace(verified, equal=error)


def _same_dense(folder: Path, dense: nn.Module) -> None:
    """Errors: CheckFailed for other weights; after a recovery only the digest in the record identifies them."""
    record = read_record(folder)
    if record is not None and "dense" in record and record.text("dense") != weights_digest(dense):
        todo = "give the weights that the run had, for example by --weights"
        raise CheckFailed("MODEL is not the dense model of this run", "its weights differ", todo)


def _same_shapes(expected: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        sizes = [tuple(state[name].shape) if name in state else "absent" for state in (expected, stored)]
        if sizes[0] != sizes[1]:
            why = f"{name} is {sizes[1]} in the folder and {sizes[0]} after cutting MODEL by the plan"
            raise CheckFailed("the stored model is not MODEL cut by its plan", why, "give the dense model of this run")


def _recovered(folder: Path) -> tuple[str, ...]:
    record = read_record(folder)
    if record is None:
        return ()
    name = "healed" if "healed" in record.data else "recovered"  # its name in version 0.1, and now
    return tuple(item.fields().text("by") for item in record.list_of(name))
