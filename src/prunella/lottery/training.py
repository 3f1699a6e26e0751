"""The specification of a training, which tickets, their controls and `instability` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prunella.errors import CheckFailed, RequestError
from prunella.lottery.session import Session, TrainingPoint
from prunella.model.rng import seeded
from prunella.model.state import mode
from prunella.model.user_code import quality_of
from prunella.recovery.finetune import Training
from prunella.types import Loss

Train = Callable[[nn.Module, Session], object]
"""A function that trains a model in place on the batches of `session.steps(loader, optimizer, ...)`."""
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class TrainingSpec:
    """A complete training: a function of (model, session), its number of steps, the evaluation and the seed.

    train: your own loop over `session.steps(...)` (see `prunella.lottery.Session`), or `descent(data, loss, lr=...)`.
    steps: of one training, at least 1. evaluate: quality of a model, higher is better. seed: of every generator.
    """

    train: Train
    steps: int
    evaluate: Score | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"cannot train {self.steps} steps", "at least one is needed")

    def run(self, model: nn.Module, session: Session) -> Session:
        """Train `model` by `session` in training mode, from the spec's seed; the caller's random state is restored."""
        with seeded(self.seed), mode(model, training=True):
            self.train(model, session)
        session.check()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if not bool(torch.isfinite(parameter).all()):
                why = "the training diverged"
                raise CheckFailed(f"{name} is not finite after training", why, "use a smaller learning rate")
        return session

    def session(self, model: nn.Module, *, start: TrainingPoint | None = None, keep_at: int | None = None) -> Session:
        """A session of this spec for `model`."""
        return Session(model, self.steps, start=start, keep_at=keep_at)

    def score(self, model: nn.Module) -> float | None:
        """The quality of `model` in evaluation mode; None without an evaluation."""
        if self.evaluate is None:
            return None
        with seeded(self.seed), mode(model, training=False), torch.no_grad():
            return quality_of(self.evaluate(model), "evaluate=", "this model", dense=True)


def descent(data: Iterable[object], loss: Loss, *, lr: float, training: Training | None = None) -> Train:
    """A plain training function for a `TrainingSpec`, with the settings of `prunella.finetune`.

    data: batches, repeated until the steps are done. training: optimizer, learning-rate schedule and clipping.
    lr: the largest learning rate.
    """
    how = training or Training()

    def train(model: nn.Module, session: Session) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = how.optimizer(trained, lr)
        schedule = LambdaLR(optimizer, lambda step: how.lr_schedule(min(1.0, (step + 0.5) / session.total)))
        for batch in session.steps(data, optimizer, schedule):
            optimizer.zero_grad(set_to_none=True)
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            if how.clip:
                nn.utils.clip_grad_norm_(trained, how.clip)
            optimizer.step()
            schedule.step()

    return train
