"""Half-space projected gradient descent: a coupled unit that a step would turn around becomes exactly zero."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.train.penalty.proximal import rates, trained_by
from prunella.train.penalty.units import Coupled, Units


@training(source="Chen et al. 2021, arXiv:2107.07467 (OTO, HSPG)")
class HalfSpace:
    """Train once, and end with units that are exactly zero: half-space steps on the coupled units of the model.

    After each optimizer step the step of the mixed norm follows, `y_u = w_u(after) - lr * strength * w_u / ||w_u||`
    with `w_u` the unit before the step. From step `start` on a unit is set to zero where `<y_u, w_u> <= epsilon
    ||w_u||^2`: where it has left the half-space of what it was. Zero units stay zero. `plan_zeros` and `shrink` then
    remove them exactly.

    strength: above 0, usual 1e-4 to 1e-1. epsilon: in [0, 1), larger makes more zeros. start: steps from 0 before
    projections begin, so that the weights have settled. least: units of each group that stay, at least 1.

    Data: none of its own. Where the paper's groups are producer rows with bias and normalisation, these hold the
    consumer columns as well. Groups are treated one after the other; where the learning rates in a unit differ, the
    largest counts.

    Use: training from scratch or long fine-tuning that ends with a net to shrink. Avoid: an exact budget, short runs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        units: Coupled,
        *,
        strength: float,
        epsilon: float = 0.0,
        start: int = 0,
        least: int = 1,
    ) -> None:
        if not (strength > 0 and 0 <= epsilon < 1 and start >= 0 and least >= 1):
            found = f"found strength={strength:g}, epsilon={epsilon:g}, start={start}, least={least}"
            todo = "for example strength=1e-2, epsilon=0.0, start=1000"
            raise RequestError("HalfSpace needs a positive strength and 0 <= epsilon < 1", found, todo)
        self.units, self.strength, self.epsilon, self.least = units, strength, epsilon, least
        self.start, self.taken = start, 0
        named = units.named(model)
        self._named = {part.name: named[part.name] for group in units.groups for part in group.slices}
        trained_by(optimizer, self._named)
        self._before: dict[str, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = {name: parameter.detach().clone() for name, parameter in self._named.items()}

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rate = rates(optimizer, self._named)
        for units in self.units.groups:
            step = max(rate[part.name] for part in units.slices) * self.strength
            norms = units.squares(self._before).sqrt()
            pull = step / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            for name, factor in units.factors(self._before, torch.where(norms > 0, 1 - pull, 1.0)):
                self._named[name].add_(self._before[name] * (factor - 1))
        if self.taken >= self.start:
            for units in self.units.groups:
                self._project(units)
        self.taken += 1
        self._before = {}

    def _project(self, units: Units) -> None:
        squares = units.squares(self._before)
        stays = units.dots(self._named, self._before) > self.epsilon * squares
        if int(stays.sum()) < self.least:
            stays[squares.sort(descending=True, stable=True).indices[: self.least]] = True
        units.scale_(self._named, stays.to(squares))
