"""Statistics of gradients. Each slot accumulates the gradients of one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from prunella.graph.data import Group, Member
from prunella.stats.subject import Subject

Grads = Mapping[str, Tensor]


class MeanGrad:
    """`grad`: mean over batches of the gradient, in the shape of the parameter."""

    def __init__(self, subject: Subject) -> None:
        self._sums = {name: _zeros(subject.parameters[name]) for name in subject.scored}
        self._batches = 0

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One batch."""
        self._batches += 1
        for name, grad in grads.items():
            self._sums[name] += grad

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: total / self._batches for name, total in self._sums.items()}


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(_single(weight.detach()))


def _single(values: Tensor) -> Tensor:
    """In single precision at least: squares of half-precision gradients underflow."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class MeanSquaredGrad:
    """`grad_sq`: mean over batches of the squared gradient of a batch."""

    def __init__(self, subject: Subject) -> None:
        self._mean = MeanGrad(subject)

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One batch."""
        self._mean.add({name: _single(grad).square() for name, grad in grads.items()})

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return self._mean.result()


class GateGrad:
    """`gate_grad`: per batch, the gradient to a gate of 1 on each unit of each group, or on each weight of each layer.

    Groups: by group name, `(batches, units)`. Layers: by entity, `(batches, *shape)`, which holds as many copies of
    the weights as there are batches; `grad_sq` needs one.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._rows: dict[str, list[Tensor]] = {}

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One batch."""
        weights = self._subject.parameters
        for group in self._subject.groups:
            self._rows.setdefault(group.name, []).append(gate_gradient(group, weights, grads))
        for layer in self._subject.layers:
            weight = weights[layer.entity].detach()
            self._rows.setdefault(layer.entity, []).append(weight * grads.get(layer.entity, torch.zeros_like(weight)))

    def result(self) -> dict[str, Tensor]:
        """By group name or entity."""
        return {name: torch.stack(rows) for name, rows in self._rows.items()}


def gate_gradient(group: Group, weights: Mapping[str, Tensor], grads: Grads) -> Tensor:
    """Gradient of the loss to a gate of 1 on each unit, wherever its activation is read: `(units,)` in float64.

    `dL/dz_u = sum over the weights that read u of w * dL/dw`. This is exact: a gate on the activation and the same
    factor on the columns that read the activation are one function. Without readers the sum is over the rows and the
    bias that produce the unit: a gate on the output of the producer. For a residual block it is over all parameters: a
    gate on the weights.
    """
    readers = [m for m in group.members if m.role == "in" and m.entity in weights]
    producers = [m for m in group.members if m.role in ("out", "bias") and m.entity in weights]
    gates = torch.zeros(group.size, dtype=torch.float64, device="cpu")
    members = [m for m in group.members if m.entity in weights]
    for member in members if group.paths else readers or producers:
        if member.entity in grads:
            product = weights[member.entity].detach() * grads[member.entity]
            gates.index_add_(0, torch.from_numpy(member.unit), _along(product, member))
    return gates


def _along(values: Tensor, member: Member) -> Tensor:
    """Sums over all other axes, at the member's positions."""
    sums = values.movedim(member.axis, 0).reshape(values.shape[member.axis], -1).sum(1, dtype=torch.float64).cpu()
    return sums[torch.from_numpy(member.index)]
