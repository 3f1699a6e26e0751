"""Half-space projected gradient descent: a coupled unit becomes exactly zero when a step reverses its direction."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.unwrap import bare_optimizer
from prunella.registry.method import training
from prunella.train.penalty.proximal import rates, trained_by
from prunella.train.penalty.units import CoupledUnits, Units


@training(source="Chen et al. 2021, arXiv:2107.07467 (OTO, HSPG)")
class HalfSpace:
    """Train once, with exactly zero units at the end: half-space steps on the coupled units of the model.

    After each optimizer step comes the step of the mixed norm, `y_u = w_u(after) - lr * strength * w_u / ||w_u||`
    with `w_u` the unit before the step. From step `start` on a unit is set to zero if `<y_u, w_u> <= epsilon
    ||w_u||^2`: it has then left the half-space of its former value. Zero units stay zero. `plan_zeros` and `shrink`
    then remove the zero units exactly.

    strength: above 0, usual 1e-4 to 1e-1. epsilon: in [0, 1), larger makes more zeros. start: from 0 up, steps before
    the first projection, in which the weights settle. min_units: kept units of each group, at least 1.

    Data: none of its own. The paper's groups are producer rows with bias and normalization; the groups here also hold
    the consumer columns. Groups are treated one after the other; where the learning rates in a unit differ, the largest
    one is used.

    Use: training from scratch or long fine-tuning, before `shrink`. Avoid: an exact budget, short runs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        units: CoupledUnits,
        *,
        strength: float,
        epsilon: float = 0.0,
        start: int = 0,
        min_units: int = 1,
    ) -> None:
        if not (strength > 0 and 0 <= epsilon < 1 and start >= 0 and min_units >= 1):
            why = f"found strength={strength:g}, epsilon={epsilon:g}, start={start}, min_units={min_units}"
            todo = "for example strength=1e-2, epsilon=0.0, start=1000"
            raise RequestError("HalfSpace needs a positive strength and 0 <= epsilon < 1", why, todo)
        self.units, self.strength, self.epsilon, self.min_units = units, strength, epsilon, min_units
        self.start, self.taken = start, 0
        named = units.named(model)
        self._named = {part.name: named[part.name] for group in units.groups for part in group.slices}
        optimizer = bare_optimizer(optimizer)
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
            relative_step = step / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            for name, factor in units.factors(self._before, torch.where(norms > 0, 1 - relative_step, 1.0)):
                self._named[name].add_(self._before[name] * (factor - 1))
        if self.taken >= self.start:
            for units in self.units.groups:
                self._project(units)
        self.taken += 1
        self._before = {}

    def _project(self, units: Units) -> None:
        squares = units.squares(self._before)
        kept = units.dots(self._named, self._before) > self.epsilon * squares
        if int(kept.sum()) < self.min_units:
            kept[squares.sort(descending=True, stable=True).indices[: self.min_units]] = True
        units.scale_(self._named, kept.to(squares))
