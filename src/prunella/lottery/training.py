"""How a model is trained, as one value that tickets, their controls and instability share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prunella.errors import CheckFailed, RequestError
from prunella.lottery.session import Lap, Point
from prunella.model.rng import seeded
from prunella.model.state import mode
from prunella.recovery.finetune import Training
from prunella.types import Loss

Train = Callable[[nn.Module, Lap], object]
"""Trains a model in place on the batches of `lap.steps(loader, optimizer, ...)`."""
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Course:
    """A complete training: a function of (model, lap), its number of steps, how its result is judged, and its seed.

    train: your own loop over `lap.steps(...)` (see `prunella.lottery.Lap`), or `descent(data, loss, lr=...)`.
    steps: of one training, at least 1. evaluate: quality of a model, higher is better. seed: of every generator.
    """

    train: Train
    steps: int
    evaluate: Score | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"cannot train {self.steps} steps", "at least one is needed")

    def run(self, model: nn.Module, lap: Lap) -> Lap:
        """Train `model` through `lap` in training mode, from the course's seed; the caller's generators stay."""
        with seeded(self.seed), mode(model, training=True):
            self.train(model, lap)
        lap.check()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if not bool(torch.isfinite(parameter).all()):
                raise CheckFailed(f"training made {name} not finite", "", "use a smaller learning rate")
        return lap

    def lap(self, model: nn.Module, *, start: Point | None = None, keep_at: int | None = None) -> Lap:
        """A lap of this course for `model`."""
        return Lap(model, self.steps, start=start, keep_at=keep_at)

    def score(self, model: nn.Module) -> float | None:
        """The quality of `model` in evaluation mode; None if nobody asked for it."""
        if self.evaluate is None:
            return None
        with seeded(self.seed), mode(model, training=False), torch.no_grad():
            return float(self.evaluate(model))


def descent(data: Iterable[object], loss: Loss, *, lr: float, training: Training | None = None) -> Train:
    """A plain training function for a `Course`, with the settings of `prunella.finetune`.

    data: batches, passed over again until the steps are done. training: optimizer, learning-rate curve and clipping.
    """
    how = training or Training()

    def train(model: nn.Module, lap: Lap) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = how.optimizer(trained, lr)
        schedule = LambdaLR(optimizer, lambda step: how.rate(min(1.0, (step + 0.5) / lap.total)))
        for batch in lap.steps(data, optimizer, schedule):
            optimizer.zero_grad(set_to_none=True)
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            if how.clip:
                nn.utils.clip_grad_norm_(trained, how.clip)
            optimizer.step()
            schedule.step()

    return train
