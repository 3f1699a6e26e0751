"""A small training loop for recovery. A custom loop works as well, with a `prunella.Pruner` attached to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from prunella.errors import CheckFailed, RequestError
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.lock import locked
from prunella.model.batches import data_errors, trainable
from prunella.model.rng import seeded
from prunella.model.state import mode, outside_inference, restored_on_error
from prunella.recovery.checkpoint import Checkpoint
from prunella.registry.method import recovery
from prunella.train.pruner import Pruner
from prunella.types import Loss

OptimizerFactory = Callable[[list[nn.Parameter], float], Optimizer]
"""A function of (parameters, learning rate)."""
LRSchedule = Callable[[float], float]
"""Progress in [0, 1] -> factor of the learning rate."""
OnStep = Callable[[int, float, float], None]
"""Called after each step with its number from 0, its loss and its learning rate."""


@dataclass(frozen=True)
class LossCurve:
    """Loss and learning rate of every step."""

    loss: tuple[float, ...]
    lr: tuple[float, ...]

    def __str__(self) -> str:
        few = max(min(10, len(self.loss) // 2), len(self.loss) // 10, 1)  # fewer steps are as noisy as their batches
        first, last = sum(self.loss[:few]) / few, sum(self.loss[-few:]) / few
        return f"loss {first:.4g} -> {last:.4g} in {len(self.loss)} steps, learning rate up to {max(self.lr):.3g}"


def adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """AdamW with a weight decay of 0.01 on matrices and none on biases and scales."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=lr)


def warmup_cosine(progress: float, *, warmup: float = 0.1) -> float:
    """A linear rise during the first fraction `warmup` of the steps, then a half cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


@dataclass(frozen=True)
class Training:
    """Settings of a training loop.

    optimizer: a function of (parameters, learning rate). lr_schedule: progress in [0, 1] -> factor of the learning
    rate. clip: largest norm of the gradient, 0 for no limit. seed: of dropout and shuffling. checkpoint: a file for the
    state of the training, written every minute; after a kill the same call resumes from it.
    """

    optimizer: OptimizerFactory = adamw
    lr_schedule: LRSchedule = warmup_cosine
    clip: float = 1.0
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None


_DEFAULT = Training()


@recovery(source="Han et al. 2015, arXiv:1506.02626; learning rates: Renda et al. 2020, arXiv:2003.02389")
def finetune(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    *,
    steps: int,
    lr: float,
    training: Training = _DEFAULT,
    on_step: OnStep | None = None,
) -> LossCurve:
    """Train `model` in place for `steps` steps and return the curve; the masks of the model stay in force.

    At step t the learning rate is `lr * training.lr_schedule((t + 1/2) / steps)`. The model is trained in training
    mode, and the training flag of every module is restored. Only parameters with `requires_grad` are trained.

    data: batches, repeated until the steps are done. training: optimizer, learning-rate schedule, clipping and seed;
    the caller's random state does not change. on_step: called after each step with its number, loss and learning rate.

    Errors: Locked while another training writes the checkpoint; CheckFailed if loss or gradient is not finite: the
    model then has the last weights with a finite loss. After
    any other error, of the loss, the data or an interrupt, the model is as before.

    Example:

        >>> import torch, prunella as pr
        >>> model, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> curve = pr.finetune(model, [(x, x[:, :1])], loss, steps=50, lr=0.05)
        >>> curve.loss[-1] < curve.loss[0]
        True

    Use: data with labels. Avoid: a handful of samples: the model overfits; `reconstruct` needs fewer.
    """
    guard = restored_on_error(model, but=(CheckFailed,))
    alone = locked(training.checkpoint) if training.checkpoint else nullcontext()
    with alone, guard, outside_inference(), torch.enable_grad():  # also if the caller has disabled gradients
        return _trained(model, data, loss, steps, lr, training, on_step)


def _trained(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    steps: int,
    lr: float,
    training: Training,
    on_step: OnStep | None,
) -> LossCurve:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check(steps, lr, trained)
    optim = training.optimizer(trained, lr)
    bases = [group["lr"] for group in optim.param_groups]
    with mode(model, training=True, compiled=True), seeded(training.seed), Pruner(model, optim):
        kept = Checkpoint(training.checkpoint, model, optim, partial(_identity, model, data, loss, steps, lr, training))
        last_finite = _LastFinite(model)
        for step, batch in enumerate(kept.batches(data, steps), kept.step):
            factor = training.lr_schedule((step + 0.5) / steps)
            for group, base in zip(optim.param_groups, bases, strict=True):
                group["lr"] = base * factor
            optim.zero_grad(set_to_none=True)
            with data_errors(model, batch):
                value = _scalar(loss(model, trainable(batch)))
            last_finite.check(value, f"the loss became {value.item()} at step {step}", lr)
            last_finite.keep()
            value.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, training.clip or math.inf)
            last_finite.check(norm, f"the gradient became {norm.item()} at step {step}", lr)
            optim.step()
            kept.done(value.item(), lr * factor, data)
            if on_step:
                on_step(step, kept.losses[-1], kept.rates[-1])
    optim.zero_grad(set_to_none=True)
    return LossCurve(tuple(kept.losses), tuple(kept.rates))


def _identity(model: nn.Module, data: Iterable[Any], loss: Loss, steps: int, lr: float, training: Training) -> Identity:
    """Everything that determines a training, without the path of its checkpoint."""
    asked = {"data": data, "loss": loss, "steps": steps, "lr": lr, "training": replace(training, checkpoint=None)}
    return identify({**model_parts(model), **asked})


def _check(steps: int, lr: float, trained: list[nn.Parameter]) -> None:
    if steps < 1 or not 0 < lr < math.inf:
        raise RequestError(f"cannot train {steps} steps at lr={lr:g}", "both must be positive", "for example lr=1e-4")
    if any(parameter.is_inference() for parameter in trained):
        why = "it was made in torch.inference_mode(), where no tensor can have a gradient"
        raise RequestError("the model cannot be trained", why, "make or load it outside, or train a copy.deepcopy")
    if not trained:
        raise RequestError(
            "no parameter of the model requires a gradient", "all are frozen", "call model.requires_grad_(True)"
        )


def _scalar(value: Tensor) -> Tensor:
    if value.numel() == 1:
        return value.reshape(())
    raise RequestError(
        f"the loss has shape {tuple(value.shape)}", "one number is needed", "for example return losses.mean()"
    )


class _LastFinite:
    """A copy of the last model state with a finite loss."""

    def __init__(self, model: nn.Module) -> None:
        self.live = [*model.parameters(), *model.buffers()]
        self.copy: list[Tensor] = [tensor.detach().clone() for tensor in self.live]

    def keep(self) -> None:
        """Copy the present state, which gave a finite loss."""
        with torch.no_grad():
            for saved, tensor in zip(self.copy, self.live, strict=True):
                saved.copy_(tensor)

    def check(self, value: Tensor, what: str, lr: float) -> None:
        """Restore the copy and raise CheckFailed if `value` is not finite."""
        if bool(torch.isfinite(value)):
            return
        with torch.no_grad():
            for saved, tensor in zip(self.copy, self.live, strict=True):
                tensor.copy_(saved)
        raise CheckFailed(
            what,
            "the last weights with a finite loss were restored",
            f"use a learning rate smaller than {lr:g}, or check the data",
        )
