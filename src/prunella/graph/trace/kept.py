"""Tensors that outlive a run: on a module, in a hook, in an argument or outside the model; later code may read them."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunella.graph.solve.labels import Reason
from prunella.graph.trace.recorder import Trace
from prunella.model.trees import is_empty, tensors

if TYPE_CHECKING:
    from prunella.graph.trace.run import TracedRun

_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_ATOMS = frozenset({bool, int, str, float, type(None)})


def kept_on(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor, of all tensors in plain attributes of modules and in objects that their hooks refer to.

    A name is `path.attribute`, with a number where the attribute holds several tensors.
    """
    named: dict[str, Tensor] = {}
    without: set[int] = set()  # values without tensors, such as a configuration that all modules share
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OWN or type(value) in _ATOMS or id(value) in without or is_empty(value):
                continue
            inside = tensors(value)
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
    ours = {id(tensor) for tensor in (*known, *model.parameters(), *model.buffers())}
    if not _held(_alive(record, ours)):
        return []
    gc.collect()  # garbage is not kept
    names = {id(tensor): name for name, tensor in kept_on(model).items()}
    return [
        (tensor, f"the model keeps it after a run, as {names[id(tensor)]}" if id(tensor) in names else _ELSEWHERE)
        for tensor in _held(_alive(record, ours))
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


def _held(alive: list[Tensor]) -> list[Tensor]:
    """The tensors that a Python object refers to, apart from those that only a view keeps alive.

    The garbage collector does not show the referents of frozen objects: if there are any, references are counted.
    """
    if gc.get_freeze_count():
        alone = max([sys.getrefcount(tensor) for tensor in [torch.empty(0)]])
        return [tensor for tensor in alive if sys.getrefcount(tensor) > alone]
    holders = [holder for holder in gc.get_referrers(*alive) if holder is not alive] if alive else []
    held = {id(part) for holder in holders if not inspect.isframe(holder) for part in gc.get_referents(holder)}
    return [tensor for tensor in alive if id(tensor) in held]


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
