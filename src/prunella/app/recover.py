"""The steps of recovery, each on the pruned model in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunella.app.job import Job, RecoveryStep
from prunella.app.prune_data import MOST, check_finite
from prunella.errors import CheckFailed, RequestError
from prunella.model.forward import Outputs, forward
from prunella.planning.plan import Plan
from prunella.recovery.batchnorm import recalibrate_bn
from prunella.recovery.distill import distill, distill_logits
from prunella.recovery.finetune import LossCurve, Training, finetune
from prunella.recovery.reconstruct import reconstruct
from prunella.types import Loss

Tick = Callable[..., None]
"""Called after each part of a stage; it accepts and ignores any arguments, so it fits every callback."""


@dataclass(frozen=True)
class Recovered:
    """The result of one step of recovery. curve: the losses of a training step."""

    step: RecoveryStep
    text: str
    curve: LossCurve | None = None

    def plain(self) -> dict[str, Any]:
        """As nested data, for a file."""
        curve = None if self.curve is None else {"loss": list(self.curve.loss), "lr": list(self.curve.lr)}
        return {"text": self.text, "curve": curve}

    @classmethod
    def read(cls, step: RecoveryStep, plain: Mapping[str, Any]) -> Recovered:
        """The result from the output of `plain`."""
        curve = plain["curve"]
        return cls(step, plain["text"], curve and LossCurve(tuple(curve["loss"]), tuple(curve["lr"])))


def recover_(
    small: nn.Module, dense: nn.Module, plan: Plan, job: Job, step: RecoveryStep, tick: Tick, checkpoint: Path | None
) -> Recovered:
    """Do one step in place. The job has been checked. checkpoint: the file for the state of training; see `Training`.

    Errors: BadInput instead of CheckFailed if the data holds NaN or infinity: the data is at fault, not the step.
    """
    try:
        return _recovered(small, dense, plan, job, step, tick, checkpoint)
    except CheckFailed:
        data = job.recovery_data if step.kind in ("distill", "finetune") else job.data
        assert data is not None, "checked at the start"
        check_finite(itertools.islice(data, MOST))
        raise


def _recovered(
    small: nn.Module, dense: nn.Module, plan: Plan, job: Job, step: RecoveryStep, tick: Tick, checkpoint: Path | None
) -> Recovered:
    if step.kind in ("distill", "finetune"):
        curve = _train(small, dense, job, step, tick, Training(seed=job.recipe.seed, checkpoint=checkpoint))
        return Recovered(step, str(curve), curve)
    data = job.data
    assert data is not None, "checked at the start"
    if step.kind == "bn":
        return Recovered(step, f"{len(recalibrate_bn(small, data, loss=job.loss))} batch normalizations")
    fitted = reconstruct(small, dense, data, plan, loss=job.loss, ridge=job.recovery.ridge, on_fit=tick)
    return Recovered(step, str(fitted))


def _train(
    small: nn.Module, dense: nn.Module, job: Job, step: RecoveryStep, tick: Tick, training: Training
) -> LossCurve:
    how, data = job.recovery, job.recovery_data
    assert data is not None, "checked at the start"
    if step.kind == "distill":
        imitate = how.imitate or partial(distill_logits, outputs=outputs_by(job.loss) if job.loss else forward)
        return distill(
            small, dense, data, steps=step.steps, lr=how.lr, imitate=imitate, training=training, on_step=tick
        )
    assert job.loss is not None, "checked at the start"
    return finetune(small, data, job.loss, steps=step.steps, lr=how.lr, training=training, on_step=tick)


def outputs_by(loss: Loss) -> Outputs:
    """The outputs of the model for a batch, captured from the call inside `loss(model, batch)`."""

    def outputs(model: nn.Module, batch: Any) -> Any:
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, arguments, output: seen.append(output))
        with handle:
            loss(model, batch)
        if not seen:
            raise RequestError("the loss does not call the model", "model(...) was not called", "call it in the loss")
        return seen[-1]

    return outputs
