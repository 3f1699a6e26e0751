"""What a job on a language model in memory will take: seconds by a measured pass, bytes by the copies that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunella.app.job import TRAINED, RecoveryStep
from prunella.llm.streaming.memory import resident
from prunella.measure.clock import now, since
from prunella.measure.text import byte_size, duration
from prunella.model.forward import forward
from prunella.model.memory import stored_size
from prunella.model.state import mode

_PLANNED = 10
"""Copies of the model while a plan is made: smaller ones, and several in double precision that are compared; more than
8 were seen with a model of 135 million parameters."""
_TRAINED_COPIES = {"lora": 2.5, "distill": 4.0, "finetune": 4.0}
"""Copies while it trains: the smaller one, gradients and Adam's two moments of what is trained, kept states."""
_PASSES = {"match": 4.0, "lora": 4.0, "distill": 4.0, "finetune": 3.0}
"""Forward passes that a batch, or a step of training, is worth: the teacher's one, and three of a training pass."""


@dataclass(frozen=True)
class JobCost:
    """What a job takes. seconds: without what does not grow with the data, such as tracing. bytes: of the process."""

    seconds: float
    bytes: int
    passes: float
    pass_seconds: float

    def __str__(self) -> str:
        return (
            f"{byte_size(self.bytes)} of memory, and about {duration(self.seconds)} for {self.passes:.0f} passes of "
            f"{duration(self.pass_seconds)}; tracing and checking the model come on top"
        )


def predicted_cost(model: nn.Module, data: Sequence[Any], steps: Sequence[RecoveryStep], judged: int) -> JobCost:
    """Of planning with one pass over the data, recovery, and `judged` windows for each of three models.

    One pass over the first batch is measured.
    """
    with mode(model, training=False), torch.no_grad():
        forward(model, data[0])
        start = now()
        forward(model, data[0])
        seconds = since(start)
    passes = len(data) + 3.0 * judged
    copies = float(_PLANNED)
    for step in steps:
        passes += _PASSES.get(step.kind, 0.0) * (step.steps if step.kind in TRAINED else len(data))
        copies = max(copies, _TRAINED_COPIES.get(step.kind, 0.0))
    return JobCost(passes * seconds, int(resident() + copies * stored_size(model)), passes, seconds)
