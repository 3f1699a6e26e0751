"""The parts of a demo: a model, an example input and a job."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunella.app.job import Job
from prunella.types import Inputs


@dataclass(frozen=True)
class Effort:
    """The amount of work of a demo. steps: of distillation; 100 for the digits and 49 for MiniLM unless given.

    training: steps that make the dense digits network. texts: most passages and most held-out sections for MiniLM.
    """

    steps: int | None = None
    texts: int | None = None
    training: int = 150


@dataclass(frozen=True)
class Demo:
    """The arguments of `run`."""

    model: nn.Module
    inputs: Inputs
    job: Job
