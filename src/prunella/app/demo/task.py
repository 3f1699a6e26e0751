"""What a demo needs to know of a model and its data. Nothing here, or in `run`, knows what is inside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prunella.app.demo.stages import Tick
from prunella.planning.recipe import Recipe
from prunella.types import Inputs, Loss

Quality = Mapping[str, float]
"""Name of a measure -> value; higher is better."""
Teach = Callable[[nn.Module, Tick], tuple[list[Any], Loss]]
"""Runs the dense model once over the healing data and returns batches with its answers, and the loss to follow them."""


@dataclass(frozen=True)
class Task:
    """A model, an example, data to calibrate and heal with, and a way to measure quality on data kept apart.

    outputs: what is compared of a model on a batch of `calibration`, one row a sample.
    quality: of any model, by name. quality_steps, teach_steps: passes over data, for the progress bars.
    save: keywords for `prunella.save`.
    """

    name: str
    data: str
    model: nn.Module
    example: Inputs
    recipe: Recipe
    calibration: list[Any]
    loss: Loss
    outputs: Callable[[nn.Module, Any], Tensor]
    quality: Callable[[nn.Module, Tick], Quality]
    quality_steps: int
    teach: Teach
    teach_steps: int
    steps: int
    lr: float
    save: Mapping[str, Any] = field(default_factory=dict)
