"""One observed run of a model: the relations between positions that its operations create, and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunella.graph.data import PLAIN, Setting
from prunella.graph.solve.labels import WHOLE, Ledger
from prunella.graph.sources import by_memory, memory
from prunella.graph.trace.answers import AnswerMode
from prunella.graph.trace.caches import uncached
from prunella.graph.trace.dataflow import watched
from prunella.graph.trace.kept_state import keep
from prunella.graph.trace.modes import Calls, Operations
from prunella.graph.trace.recorder import Trace, TracedValue, storage_key
from prunella.graph.trace.tracked_int import tracked_attributes
from prunella.model.constants import constants
from prunella.model.forward import forward, inputs_of, returned, states
from prunella.model.trees import own, tensors
from prunella.model.unregistered import unregistered


def _entities(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, Tensor], set[str]]:
    """Parameters, buffers and constants by identity: first name -> all names, its tensor, and which are parameters."""
    names: dict[int, list[str]] = {}
    by_id: dict[int, Tensor] = {}
    parameters = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False), *constants(model).items()]:
        names.setdefault(id(tensor), []).append(name)
        by_id[id(tensor)] = tensor
    first = {key: aliases[0] for key, aliases in names.items()}
    kinds = {first[id(p)] for _, p in parameters}
    return {first[k]: tuple(v) for k, v in names.items()}, {first[k]: t for k, t in by_id.items()}, kinds


@dataclass(frozen=True)
class TracedRun:
    """A run and its record; it keeps the tensors of the run alive. inputs: the model's copy, which it may have filled.

    handed_on: tensors of state that the model passes to its next run. output: the returned object, which may hold
    tensors that no list shows.
    """

    record: Trace
    inputs: Any
    outputs: list[Tensor]
    handed_on: list[Tensor]
    output: Any


def new_record(model: nn.Module, start: int = 1) -> Trace:
    """An empty record. start: number of its first atom."""
    names, entities, parameters = _entities(model)
    record = Trace(names, entities, parameters, Ledger(start))
    record.constants = constants(model).keys() & entities.keys()
    for name, tensor in entities.items():
        record.aliases[storage_key(tensor)] = name
    record.unregistered = by_memory(unregistered(model))
    record.shared = _overlapping({name: entities[name] for name in parameters})
    return record


def _overlapping(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter -> another parameter with overlapping memory that is not the same parameter."""
    at: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in parameters.items():
        key = memory(tensor)
        if key is not None and tensor.numel():
            first = int(tensor.storage_offset())
            last = first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            at.setdefault(key, []).append((first, last, name))
    return {
        name: other
        for places in at.values()
        for first, last, name in places
        for start, end, other in places
        if other != name and first <= end and start <= last
    }


def trace(
    record: Trace,
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    *,
    asked: AnswerMode | None = None,
    setting: Setting = PLAIN,
) -> TracedRun:
    """Run `model` on a copy of `inputs` once and record. All positions of inputs are kept.

        asked: collects the values that the source reads, and may change them. setting: the other conditions of the run.
    Outputs are read while the modes observe the run, since an output may compute its tensors on access. Errors: those
    of the model; the record then ends where the run did.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        keep(model, setting)
        batches = [inputs_of(model, own(batch)) for batch in (*setting.before, inputs)]
        stack.enter_context(watched(model, record.modules, record.flow))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(tracked_attributes(model, record.leak))
        stack.enter_context(uncached(model))
        stack.enter_context(Operations(record, apply_rule))
        for batch in batches[:-1]:  # recorded, so that tensors left on the model have labels and sizes
            _enter_batch(record, batch)
            with Calls(record):
                forward(model, batch, copy=False)
        _enter_batch(record, batches[-1])
        stack.enter_context(Calls(record))
        stack.enter_context(asked or nullcontext())
        output = forward(model, batches[-1], copy=False)
        outputs = returned(model, output)
    record.flow.finish(outputs)
    handed_on = tensors([states(model, output), states(model, batches[-1])])
    return TracedRun(record, batches[-1], outputs, handed_on, output)


def _enter_batch(record: Trace, inputs: Any) -> None:
    """Label the tensors of a batch: all of their positions are kept."""
    record.flow.start(inputs)
    for number, tensor in enumerate(tensors(inputs)):
        record.values[tensor] = TracedValue.plain([WHOLE] * tensor.dim())
        record.entries[tensor] = number
        record.computed(tensor)
        if not tensor.is_floating_point():
            record.given[tensor] = number
