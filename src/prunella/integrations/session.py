"""The common part of the callbacks: masks held during training, gradual pruning, their state, a teacher in the loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.planning.accounting import sparsity
from prunella.planning.recipe import Recipe
from prunella.schedules import Schedule, cubic
from prunella.targets import Target
from prunella.train.pruner import Planner, Pruner
from prunella.types import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gradual:
    """Gradual pruning along a schedule, for a callback.

    recipe, target, inputs, schedule, nested: as for `prunella.Pruner`; a recipe may be a function from target to plan.
    steps: optimizer steps until the target is met: a number, or a fraction in (0, 1] of the whole training.
    every: optimizer steps between two plans; by default a hundredth of `steps`.

    Example:

        >>> import torch, prunella as pr
        >>> recipe = pr.Recipe(granularity=pr.Element())
        >>> pr.integrations.Gradual(recipe, target=pr.Sparsity(0.9), inputs=torch.randn(2, 8)).length(1000)
        750
    """

    recipe: Recipe | Planner
    target: Target
    inputs: Inputs | None = None
    schedule: Schedule = cubic
    steps: int | float = 0.75
    every: int | None = None
    nested: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and self.steps >= 1
        if isinstance(self.steps, bool) or not (whole or 0 < self.steps <= 1):
            why = "it takes a number of optimizer steps, or a fraction in (0, 1] of the training"
            raise RequestError(f"steps={self.steps!r} is out of range", why, "for example steps=1000 or steps=0.75")
        if self.every is not None and self.every < 1:
            raise RequestError(f"every={self.every!r} is out of range", "at least 1 is needed", "leave it out")

    def length(self, total: int) -> int:
        """Optimizer steps until the target is met, in a training of `total` steps; warns if `total` is too small."""
        if isinstance(self.steps, float):
            return max(1, round(self.steps * total))
        if self.steps > total:
            log.warning("the training ends at step %d, before the target is met at step %d", total, self.steps)
        return self.steps


@dataclass(frozen=True)
class Distillation:
    """The dense model as teacher: `(1 - alpha) loss + alpha T^2 KL(softmax(teacher / T) || softmax(model / T))`.

    teacher: a model with the same inputs; it runs in evaluation mode without gradients. alpha: in [0, 1]. temperature:
    above 0.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """

    teacher: nn.Module
    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RequestError(f"alpha={self.alpha!r} is out of range", "it takes numbers in [0, 1]", "0.5 is usual")
        if not self.temperature > 0:
            raise RequestError(
                f"temperature={self.temperature!r} is out of range", "it takes positive numbers", "usual are 1 to 10"
            )

    def divergence(self, logits: Tensor, expected: Tensor) -> Tensor:
        """`T^2 KL` of each row, `(...)` for logits `(..., classes)`. Errors: RequestError for other shapes."""
        if logits.shape != expected.shape:
            why = f"they are {tuple(logits.shape)} and {tuple(expected.shape)}"
            raise RequestError(
                "the logits of model and teacher differ in shape", why, "give the dense model as teacher"
            )
        student, teacher = (F.log_softmax(t.float() / self.temperature, -1) for t in (logits, expected))
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * self.temperature**2

    def teach(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """The output of the teacher, on the device of the inputs."""
        devices = {x.device for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)}
        if len(devices) == 1:
            self.teacher.to(devices.pop())
        training = self.teacher.training
        self.teacher.eval()
        try:
            with torch.no_grad():
                return self.teacher(*arguments, **keywords)
        finally:
            self.teacher.train(training)


@dataclass
class PruningSession:
    """A `Pruner` in the training loop of another library: started, stepped, saved and stopped by a callback.

    averages: moving averages of the weights, which get the same masks.
    """

    gradual: Gradual | None
    averages: tuple[nn.Module, ...] = ()
    pruner: Pruner | None = None
    sparsity: float | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)

    def start(self, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], total: int) -> None:
        """Hold the masks of the model from now on; resume from `load_state_dict`, if called. total: optimizer steps."""
        self.stop()
        how = self.gradual
        if how is None:
            self.pruner = Pruner(model, optimizers, averages=self.averages)
        else:
            steps = how.length(total)
            self.pruner = Pruner(
                model, optimizers, recipe=how.recipe, target=how.target, inputs=how.inputs, schedule=how.schedule,
                steps=steps, every=how.every or max(1, steps // 100), nested=how.nested, averages=self.averages,
            )  # fmt: skip
        if self._state:
            self.pruner.load_state_dict(self._state)
            self._state = {}

    def step(self) -> float | None:
        """Count an optimizer step; returns the sparsity of the plan if the model was pruned in this step."""
        plan = self.pruner.step() if self.pruner is not None else None
        if plan is None:
            return None
        self.sparsity = sparsity(plan.rows)
        return self.sparsity

    def state_dict(self) -> dict[str, Tensor]:
        """Step and masks as tensors; after the training those of its end, for a last checkpoint."""
        return self.pruner.state_dict() if self.pruner is not None else dict(self._state or self._last)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Use the masks and the step of a checkpoint, now or at the start."""
        if self.pruner is not None:
            self.pruner.load_state_dict(state)
        else:
            self._state = dict(state)

    def stop(self) -> None:
        """Release the optimizers. The masks remain with the model."""
        if self.pruner is not None:
            self._last = self.pruner.state_dict()
            self.pruner.detach()
            self.pruner = None
