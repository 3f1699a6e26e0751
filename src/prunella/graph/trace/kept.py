"""Tensors that outlive a run: on a module, in a hook, in an argument or outside the model; later code may read them."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunella.graph.solve.labels import Reason
from prunella.graph.trace.recorder import Trace
from prunella.model.trees import stored_tensors
from prunella.model.unread import is_empty, unread

if TYPE_CHECKING:
    from prunella.graph.trace.run import TracedRun

_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_ATOMS = frozenset({bool, int, str, float, type(None)})


def kept_on(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor, of all tensors in plain attributes of modules and in objects that their hooks refer to.

    A name is `path.attribute`, with a number where the attribute holds several tensors. Without what no forward pass
    reads: see `unread`.
    """
    named: dict[str, Tensor] = {}
    without = set(unread(model))  # and values without tensors, such as a configuration that all modules share
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in _ATOMS or name in _OWN or is_empty(value) or id(value) in without:
                continue
            inside = stored_tensors(value)
            if not inside:
                without.add(id(value))
            for number, tensor in enumerate(inside):
                label = f"{path}.{name}" if path else name
                named[f"{label} ({number + 1})" if number else label] = tensor
    return named


def outliving(record: Trace, model: nn.Module, known: Iterable[Tensor]) -> list[tuple[Tensor, str]]:
    """Activations with removable positions that still exist after the run, and their places, without the `known` ones.

    Their readers are unknown, so they count as outputs. Buffers are part of the model and follow its cuts.
    """
    known = [*known, *model.parameters(), *model.buffers()]
    ours = {id(tensor) for tensor in known}
    if not _referenced(_alive(record, ours), known):
        return []
    names = {id(tensor): name for name, tensor in kept_on(model).items()}
    if _held(_alive(record, ours | names.keys()), known):
        gc.collect()  # garbage is not kept
    elsewhere = {id(tensor) for tensor in _held(_alive(record, ours | names.keys()), known)}
    return [
        (tensor, f"the model keeps it after a run, as {names[id(tensor)]}" if id(tensor) in names else _ELSEWHERE)
        for tensor in _alive(record, ours)
        if id(tensor) in names or id(tensor) in elsewhere
    ]


_ELSEWHERE = "it is kept after a run, outside the model"


def _alive(record: Trace, ours: set[int]) -> list[Tensor]:
    numbers, nodes = record.flow.numbers, record.flow.nodes
    return [
        tensor
        for tensor in record.values.keys()  # type: ignore[no-untyped-call]  # noqa: SIM118 (it has no iterator)
        if id(tensor) not in ours
        and (any(record.values[tensor].dims) or tensor in record.averages)
        and tensor in numbers
        and nodes[numbers[tensor]].live
    ]


def _referenced(alive: list[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with references beside that of the list and that of the views that are alive."""
    viewed = {id(tensor._base) for tensor in (*known, *alive) if tensor._base is not None}
    alone, beside_a_view = _references()
    counts = [sys.getrefcount(tensor) for tensor in alive]
    return [t for t, count in zip(alive, counts, strict=True) if count > (beside_a_view if id(t) in viewed else alone)]


def _references() -> tuple[int, int]:
    """How many references a tensor in a list has, without and with a view that is alive; releases of torch differ."""
    alone, base = torch.empty(1, device="cpu"), torch.empty(1, device="cpu")
    tensors, views = [alone, base], [base[:1]]
    del alone, base
    assert all(view._base is not None for view in views)  # asked for as above: it may change who owns the base
    first, second = [sys.getrefcount(tensor) for tensor in tensors]
    return first, second


def _held(alive: list[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a Python object refers to, apart from those that only a view keeps alive.

    The garbage collector does not show the referents of frozen objects: if there are any, references are counted. It
    looks through all objects of the process, so it is asked about tensors with further references alone.
    """
    referenced = _referenced(alive, known)
    if not referenced or gc.get_freeze_count():
        return referenced
    ours = [alive, referenced]
    holders = [h for h in gc.get_referrers(*referenced) if all(h is not own for own in ours) and not inspect.isframe(h)]
    held = {id(part) for holder in holders for part in gc.get_referents(holder)}
    return [tensor for tensor in referenced if id(tensor) in held]


def say_example(record: Trace, start: int, suffix: str) -> None:
    """Name the run in the reasons from number `start` on."""
    for k, (atoms, reason) in enumerate(record.ledger.frozen[start:], start=start):
        record.ledger.frozen[k] = atoms, replace(reason, text=reason.text + suffix, example=record.example)


def keep_outputs(run: TracedRun, model: nn.Module, text: str) -> list[Tensor]:
    """Freeze the outputs and the tensors that outlive the run. Returns the latter."""
    record = run.record
    for tensor in run.outputs:
        record.read(tensor)
        for dim in record.value(tensor).dims:
            record.ledger.freeze(dim, Reason(text, soft="output" if len(dim) == 1 else ""))
    kept = outliving(record, model, [*run.outputs, *run.handed_on])
    for tensor, reason in kept:
        record.read(tensor)
        for dim in record.value(tensor).dims:
            record.ledger.freeze(dim, Reason(reason))
    return [*(tensor for tensor, _ in kept), *kept_on(model).values()]
