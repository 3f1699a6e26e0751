"""One pass over the data that fills exactly the slots that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, RequestError
from prunella.forward import forward
from prunella.stats.activation import InputNorm
from prunella.stats.gradient import GateGrad, MeanGrad, MeanSquaredGrad
from prunella.stats.subject import Subject


class Slot(Protocol):
    """Collects one statistic. `backward` says whether it needs gradients."""

    backward: bool

    def watch(self) -> AbstractContextManager[object]:
        """Entered around each forward pass."""
        ...

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Called once a batch, with the gradients by entity, or with nothing."""
        ...

    def result(self) -> dict[str, Tensor]:
        """The statistic, by entity or group name."""
        ...


SLOTS: dict[str, Callable[[Subject], Slot]] = {
    "grad": MeanGrad,
    "grad_sq": MeanSquaredGrad,
    "gate_grad": GateGrad,
    "input_norm": InputNorm,
}
_BACKWARD = ("grad", "grad_sq", "gate_grad")


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
    """What was collected: statistic -> entity or group name -> tensor; and over how many batches."""

    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    batches: int = 0

    def get(self, statistic: str, name: str) -> Tensor | None:
        """One value, None where there is none."""
        return self.values.get(statistic, {}).get(name)


def collect(subject: Subject, needs: Sequence[str], source: Source, asker: str = "the criterion") -> Statistics:
    """Run once over the data, if `needs` names a statistic that takes data. Use it inside `untouched`.

    Errors: RequestError when data or a loss is missing; BadInput when there is no batch or the loss is not finite.
    """
    wanted = [name for name in needs if name in SLOTS]
    if not wanted:
        return Statistics()
    data = _checked(source, wanted, asker)
    slots = {name: SLOTS[name](subject) for name in wanted}
    backward = any(slot.backward for slot in slots.values())
    batches = 0
    with torch.set_grad_enabled(backward):
        weights = _differentiable(subject) if backward else {}
        for batch in data:
            grads = _one(subject.model, batch, source, slots, weights, batches)
            for slot in slots.values():
                slot.add(grads)
            batches += 1
    if not batches:
        raise BadInput(
            f"{asker} needs data, and data= holds no batches",
            "the loader is empty, or it is a generator that was used up before",
            "pass a list of batches or a DataLoader",
        )
    return Statistics({name: slot.result() for name, slot in slots.items()}, batches)


def _one(
    model: nn.Module,
    batch: Any,
    source: Source,
    slots: Mapping[str, Slot],
    weights: Mapping[str, Tensor],
    number: int,
) -> dict[str, Tensor]:
    """Forward under the slots' eyes, then the gradients; `.grad` is never written."""
    with ExitStack() as watched:
        for slot in slots.values():
            watched.enter_context(slot.watch())
        value = source.run(model, batch)
    if not weights:
        return {}
    _check_loss(value, number)
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {name: grad.detach() for name, grad in zip(weights, found, strict=True) if grad is not None}


def _differentiable(subject: Subject) -> dict[str, Tensor]:
    """Parameters that are scored, with gradients switched on; `untouched` switches them back."""
    return {name: subject.parameters[name].requires_grad_(True) for name in subject.scored}


def _checked(source: Source, wanted: Sequence[str], asker: str) -> Iterable[Any]:
    backward = [name for name in wanted if name in _BACKWARD]
    missing = ["data="] * (source.data is None) + ["loss="] * (bool(backward) and source.loss is None)
    if missing or source.data is None:
        raise RequestError(
            f"{asker} needs `{(backward or wanted)[0]}`: pass {'data= and loss=' if backward else 'data='}",
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
