"""The strength of an update of the weights, by a line search on the loss of held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.batches import batches
from prunella.model.copying import copied
from prunella.model.forward import samples
from prunella.model.state import mode
from prunella.planning.plan import Plan
from prunella.transform.apply import apply_
from prunella.types import Loss

STRENGTHS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
"""Factors of an update that are tried, apart from 0."""
Weights = Mapping[str, Tensor]
"""Entity -> weights."""


@dataclass(frozen=True)
class Samples:
    """fit: for the curvature. held_out: for the strength, never the same samples if there are two."""

    fit: Sequence[Any]
    held_out: Sequence[Any]


def split_samples(data: Iterable[Any]) -> Samples:
    """Every fourth sample is held out. Errors: RequestError for batches that cannot be split."""
    listed = [sample for batch in batches(data) for sample in samples(batch)]
    if len(listed) < 2:
        return Samples(listed, listed)
    held_out = listed[1::4]
    return Samples([sample for number, sample in enumerate(listed) if number % 4 != 1], held_out)


@dataclass(frozen=True)
class Strength:
    """The chosen update and its factor; 0 where no update lowers the loss on the held-out samples."""

    update: str
    factor: float
    before: float
    after: float


def line_search(
    model: nn.Module, plan: Plan, updates: Mapping[str, Weights], held_out: Sequence[Any], loss: Loss
) -> Strength:
    """The factor in `STRENGTHS`, or 0, with which the masked model has the smallest loss on held-out samples."""
    before = _loss(model, plan, held_out, loss)
    best = Strength(next(iter(updates)), 0.0, before, before)
    for update, weights in updates.items():
        for factor in STRENGTHS:
            after = _loss(model, scaled(model, plan, weights, factor), held_out, loss)
            if after < best.after:
                best = Strength(update, factor, before, after)
    return best


def scaled(model: nn.Module, plan: Plan, weights: Weights, factor: float) -> Plan:
    """The plan with `w + factor (w' - w)` at kept positions, and zero where w' is zero."""
    named = dict(model.named_parameters(remove_duplicate=False))
    changed = {}
    for entity, new in weights.items():
        old = plan.weights.get(entity, named[entity].detach()).to(new)
        changed[entity] = torch.where(new == 0, new, old + factor * (new - old)) if factor < 1 else new
    return replace(plan, weights={**plan.weights, **changed})


def check_strength(strength: float | None) -> None:
    """Errors: RequestError outside 0 to 1."""
    if strength is not None and not 0 <= strength <= 1:
        raise RequestError(f"strength={strength:g} is out of range", "it is a factor of the update", "take 0 to 1")


def _loss(model: nn.Module, plan: Plan, held_out: Sequence[Any], loss: Loss) -> float:
    """The mean loss of the masked model; infinite if it is not a number."""
    masked = apply_(copied(model), plan)
    with mode(masked, training=False), torch.no_grad():
        value = sum(float(loss(masked, sample)) for sample in held_out) / len(held_out)
    return value if math.isfinite(value) else math.inf
