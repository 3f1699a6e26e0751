"""One pass over the data that fills exactly the slots that are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunella.errors import BadInput, RequestError
from prunella.model.forward import forward, samples
from prunella.stats.subject import Subject
from prunella.stats.table import STATISTICS, Slot


@dataclass(frozen=True)
class Source:
    """Where statistics come from: batches, and `loss(model, batch)`, the one way to run the model on a batch.

    Without a loss the batch decides: mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`.
    """

    data: Iterable[Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The loss, or the output where there is none."""
        if self.loss is not None:
            return self.loss(model, batch)
        try:
            return forward(model, batch)
        except (TypeError, AttributeError) as error:
            raise RequestError(
                f"the model cannot be called on a batch of type {type(batch).__name__}",
                f"{type(error).__name__}: {error}",
                "pass loss=, for example loss=lambda model, batch: model(batch[0]).sum()",
            ) from error


@dataclass(frozen=True)
class Statistics:
    """What was collected: statistic -> entity or group name -> tensor; and over how many batches.

    unread: entity -> a call that takes it and cannot be read, in words.
    """

    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    batches: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)

    def get(self, statistic: str, name: str) -> Tensor | None:
        """One value, None where there is none."""
        return self.values.get(statistic, {}).get(name)


def collect(
    subject: Subject,
    needs: Sequence[str],
    source: Source,
    asker: str = "the criterion",
    knobs: Mapping[str, Any] | None = None,
) -> Statistics:
    """Run once over the data, if `needs` names a statistic that takes data. Use it inside `untouched`.

    knobs: of the asker; a slot that has a knob of the same name takes the value.
    Errors: RequestError when data or a loss is missing; BadInput when there is no batch or the loss is not finite.
    """
    unknown = next((name for name in needs if name not in STATISTICS), None)
    if unknown is not None:
        raise RequestError(f"{asker} asks for `{unknown}`, which is no statistic", f"known are {', '.join(STATISTICS)}")
    asked = {name: STATISTICS[name] for name in needs}
    values = {name: entry.compute(subject) for name, entry in asked.items() if entry.compute}
    factories = {name: entry.slot for name, entry in asked.items() if entry.slot}
    if not factories:
        return Statistics(values)
    backward = [name for name in factories if asked[name].gradients]
    data = _checked(source, (backward or list(factories))[0], asker, backward=bool(backward))
    slots = {name: factory(subject, **_knobs(factory, knobs or {})) for name, factory in factories.items()}
    whole = [slot for slot in slots.values() if not getattr(slot, "each", False)]
    each = [slot for slot in slots.values() if getattr(slot, "each", False)]
    batches = 0
    with torch.set_grad_enabled(bool(backward)):
        weights = _differentiable(subject) if backward else {}
        for batch in data:
            if whole:
                _one(subject.model, batch, source, whole, weights, batches)
            for sample in samples(batch) if each else ():
                _one(subject.model, sample, source, each, weights, batches)
            batches += 1
    if not batches:
        raise BadInput(
            f"{asker} needs data, and data= holds no batches",
            "the loader is empty, or it is a generator that was used up before",
            "pass a list of batches or a DataLoader",
        )
    unread = {entity: str(call) for slot in slots.values() for entity, call in getattr(slot, "unread", {}).items()}
    return Statistics(values | {name: slot.result() for name, slot in slots.items()}, batches, unread)


def _knobs(slot: Callable[..., Slot], given: Mapping[str, Any]) -> dict[str, Any]:
    mine = [p.name for p in inspect.signature(slot).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: given[name] for name in mine if name in given}


def _one(
    model: nn.Module, batch: Any, source: Source, slots: Sequence[Slot], weights: Mapping[str, Tensor], number: int
) -> None:
    """Forward under the slots' eyes, then the gradients, if any; `.grad` is never written."""
    second = [slot for slot in slots if getattr(slot, "twice", False)]
    with ExitStack() as watched:
        if second:  # the fused kernels of attention have no second derivative
            watched.enter_context(sdpa_kernel(SDPBackend.MATH))
        for slot in slots:
            watched.enter_context(slot.watch())
        value = source.run(model, batch)
    grads: dict[str, Tensor] = {}
    if weights:
        _check_loss(value, number)
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True, create_graph=bool(second))
        grads = {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}
    for slot in second:
        slot.second(weights, grads)  # type: ignore[attr-defined]
    grads = {name: grad.detach() for name, grad in grads.items()}
    for slot in slots:
        slot.add(grads)


def _differentiable(subject: Subject) -> dict[str, Tensor]:
    """Parameters that are scored, with gradients switched on; `untouched` switches them back."""
    return {name: subject.parameters[name].requires_grad_(True) for name in subject.scored}


def _checked(source: Source, statistic: str, asker: str, *, backward: bool) -> Iterable[Any]:
    missing = ["data="] * (source.data is None) + ["loss="] * (backward and source.loss is None)
    if missing or source.data is None:
        raise RequestError(
            f"{asker} needs `{statistic}`: pass {'data= and loss=' if backward else 'data='}",
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing",
            "data= is an iterable of batches, loss= a function of (model, batch)",
        )
    if isinstance(source.data, Tensor | Mapping):
        raise RequestError(
            f"data= is one {type(source.data).__name__}",
            "an iterable of batches is needed",
            "for a single batch pass data=[batch]",
        )
    return source.data


def _check_loss(value: Any, number: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        detached = isinstance(value, Tensor) and value.numel() == 1
        why = "it does not depend on the parameters (detached, or under no_grad)" if detached else f"it gave {shape}"
        raise RequestError("loss(model, batch) must give one number with a gradient", why)
    if not bool(torch.isfinite(value.detach()).all()):
        raise BadInput(f"the loss is {float(value.detach()):g} on batch {number}", "gradients of it would mean nothing")
