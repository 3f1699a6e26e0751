"""One pass over the data fills exactly the slots that are needed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunella.errors import BadInput, PruningError, RequestError
from prunella.model.batches import batches as all_batches
from prunella.model.batches import check_batches
from prunella.model.device import device_is_full, devices_of, free_cached_memory, halved, short_of_memory
from prunella.model.forward import run, samples
from prunella.model.state import losses_in_training_
from prunella.stats.subject import Subject
from prunella.stats.table import STATISTICS, Slot, why_unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The source of statistics: batches, and `loss(model, batch)`, which runs the model on a batch.

    Without a loss the model runs by the type of the batch: mapping -> `model(**batch)`, tuple -> `model(*batch)`, else
    `model(batch)`.
    """

    data: Iterable[Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The loss, or the output of the model without a loss."""
        try:
            return run(model, batch, self.loss)
        except (TypeError, AttributeError) as error:
            if self.loss is not None or isinstance(error, PruningError):
                raise
            raise RequestError(
                f"the model cannot be called on a batch of type {type(batch).__name__}",
                f"{type(error).__name__}: {error}",
                "pass loss=, for example loss=lambda model, batch: model(batch[0]).sum()",
            ) from error


@dataclass(frozen=True)
class Statistics:
    """Collected values: statistic -> entity or group name -> tensor; and the number of batches.

    unread: entity -> description of a call that takes the entity and cannot be read.
    """

    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    batches: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)

    def get(self, statistic: str, name: str) -> Tensor | None:
        """One value; None if it was not collected."""
        return self.values.get(statistic, {}).get(name)


def collect(
    subject: Subject,
    needs: Sequence[str],
    source: Source,
    asker: str = "the criterion",
    knobs: Mapping[str, Any] | None = None,
) -> Statistics:
    """Run once over the data if `needs` names a statistic with a slot. Call it inside `untouched`.

    asker: name of the criterion, for messages. knobs: of the criterion; a slot takes the knobs of the same names.
    Errors: RequestError when data or a loss is missing; BadInput when there is no batch or the loss is not finite.
    """
    unknown = next((name for name in needs if name not in STATISTICS), None)
    if unknown is not None:
        raise RequestError(
            f"{asker} asks for `{unknown}`, which is not a statistic",
            why_unknown(unknown),
            "name the parameter so, or make it a knob: keyword-only",
        )
    statistics = {name: STATISTICS[name] for name in needs}
    computed = {name: entry.compute(subject) for name, entry in statistics.items() if entry.compute}
    factories = {name: entry.slot for name, entry in statistics.items() if entry.slot}
    if not factories:
        return Statistics(computed)
    backward = [name for name in factories if statistics[name].gradients]
    data = _checked(source, (backward or list(factories))[0], asker, backward=bool(backward))
    values, batches, unread = _in_less_memory(subject, source, data, factories, knobs or {}, bool(backward), asker)
    if not batches:
        raise BadInput(
            f"{asker} needs data, and data= holds no batches",
            "the loader is empty, or data= is a generator that is exhausted",
            "pass a list of batches or a DataLoader",
        )
    return Statistics(computed | values, batches, unread)


Collected = tuple[dict[str, Mapping[str, Tensor]], int, dict[str, str]]
"""Values by statistic, the number of batches, and the entities that could not be read."""
Factories = Mapping[str, Callable[..., Slot]]


def _in_less_memory(
    subject: Subject,
    source: Source,
    data: Iterable[Any],
    factories: Factories,
    knobs: Mapping[str, Any],
    backward: bool,
    asker: str,
) -> Collected:
    """The statistics; where an accelerator is full, again with every batch in halves.

    Sums over tokens do not depend on how samples are batched. The gradient of a loss may, so that it is not halved.
    Errors: OutOfResources for an accelerator that one sample fills.
    """
    while True:
        try:
            return _collected(subject, source, data, factories, knobs, backward)
        except Exception as error:  # whatever a user's loss raises
            if not short_of_memory(error):
                raise
            place = devices_of(subject.model)
            full = device_is_full(error, f"{place} is out of memory for the statistics of {asker}")
        free_cached_memory()  # outside of the handler, whose traceback keeps tensors alive
        halves = None if backward or isinstance(data, Iterator) else halved(data)
        if halves is None:
            raise full
        log.warning("%s is out of memory: again with %d smaller batches", place, len(halves))
        data = halves


def _collected(
    subject: Subject,
    source: Source,
    data: Iterable[Any],
    factories: Factories,
    knobs: Mapping[str, Any],
    backward: bool,
) -> Collected:
    """The statistics of one run over the data."""

    def new_slots() -> dict[str, Slot]:
        slots = {name: factory(subject, **_knobs(factory, knobs)) for name, factory in factories.items()}
        for slot in slots.values() if isinstance(data, Iterator) else ():
            if hasattr(slot, "once"):
                slot.once()
        return slots

    slots, batches = new_slots(), 0
    with torch.set_grad_enabled(backward):
        weights = _differentiable(subject) if backward else {}
        for batch in all_batches(data, required=False):
            try:
                _add(subject.model, batch, source, slots, weights, batches)
            except Exception:  # whatever a user's loss raises
                if batches or not losses_in_training_(subject.model, batch, source.loss):
                    raise
                slots = new_slots()  # without statistics of the failed pass
                _add(subject.model, batch, source, slots, weights, batches)
            batches += 1
        _more_passes(subject.model, data, source, slots, weights, batches)
    unread = {entity: str(call) for slot in slots.values() for entity, call in getattr(slot, "unread", {}).items()}
    return {name: slot.result() for name, slot in slots.items()}, batches, unread


def _more_passes(
    model: nn.Module,
    data: Iterable[Any],
    source: Source,
    slots: Mapping[str, Slot],
    weights: Mapping[str, Tensor],
    batches: int,
) -> None:
    """Further passes over the data for the slots that ask for them. Errors: BadInput for data that end earlier."""
    left = {name: slot for name, slot in slots.items() if hasattr(slot, "again")}
    while batches and (left := {name: slot for name, slot in left.items() if slot.again()}):
        number = 0
        for batch in all_batches(data, required=False):
            _add(model, batch, source, left, weights, number)
            number += 1
        if number < batches:
            why = f"the first pass over it had {batches}"
            raise BadInput(f"data= gave {number} batches when it was read again", why, "pass a list of batches")


def _knobs(slot: Callable[..., Slot], given: Mapping[str, Any]) -> dict[str, Any]:
    names = [p.name for p in inspect.signature(slot).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: given[name] for name in names if name in given}


def _add(
    model: nn.Module, batch: Any, source: Source, slots: Mapping[str, Slot], weights: Mapping[str, Tensor], number: int
) -> None:
    """One batch for the slots that take batches, and sample by sample for the others."""
    per_batch = [slot for slot in slots.values() if not getattr(slot, "each", False)]
    per_sample = [slot for slot in slots.values() if getattr(slot, "each", False)]
    if per_batch:
        _one(model, batch, source, per_batch, weights, number)
    for sample in samples(batch) if per_sample else ():
        _one(model, sample, source, per_sample, weights, number)


def _one(
    model: nn.Module, batch: Any, source: Source, slots: Sequence[Slot], weights: Mapping[str, Tensor], number: int
) -> None:
    """One forward pass with all slots watching, then the gradients if needed; `.grad` is never written."""
    second_order = [slot for slot in slots if getattr(slot, "twice", False)]
    with ExitStack() as watched:
        if second_order:  # the fused kernels of attention have no second derivative
            watched.enter_context(sdpa_kernel(SDPBackend.MATH))
        for slot in slots:
            if hasattr(slot, "begin"):
                slot.begin(batch)
            watched.enter_context(slot.watch())
        value = source.run(model, batch)
    grads: dict[str, Tensor] = {}
    if weights:
        _check_loss(value, number)
        gradients = torch.autograd.grad(
            value, list(weights.values()), allow_unused=True, create_graph=bool(second_order)
        )
        grads = {name: grad for name, grad in zip(weights, gradients, strict=True) if grad is not None}
    for slot in second_order:
        slot.second(weights, grads)  # type: ignore[attr-defined]
    grads = {name: grad.detach() for name, grad in grads.items()}
    for slot in slots:
        slot.add(grads)


def _differentiable(subject: Subject) -> dict[str, Tensor]:
    """The scored parameters with `requires_grad`; `untouched` restores the flag."""
    return {name: subject.parameters[name].requires_grad_(True) for name in subject.scored}


def _checked(source: Source, statistic: str, asker: str, *, backward: bool) -> Iterable[Any]:
    missing = ["data="] * (source.data is None) + ["loss="] * (backward and source.loss is None)
    if missing or source.data is None:
        raise RequestError(
            f"{asker} needs `{statistic}`: pass {'data= and loss=' if backward else 'data='}",
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing",
            "data= is an iterable of batches, loss= a function of (model, batch)",
        )
    check_batches(source.data)
    return source.data


def _check_loss(value: Any, number: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        detached = isinstance(value, Tensor) and value.numel() == 1
        why = (
            "it does not depend on the parameters (detached, or under no_grad)" if detached else f"it returned {shape}"
        )
        raise RequestError("loss(model, batch) must return one number with a gradient", why, "return the mean loss")
    if not bool(torch.isfinite(value.detach()).all()):
        raise BadInput(
            f"the loss is {float(value.detach()):g} on batch {number}",
            "its gradients are not usable",
            "check the model and the batch",
        )
