"""Controls of a mask: layers it empties, the same mask on other weights, and other masks on the same weights.

A method has to beat its controls: otherwise only the density of each layer mattered, and not which weights are kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.model.copying import copied
from prunella.model.masks import forget_masks_, reapply_, record_, records
from prunella.model.rng import seeded
from prunella.model.unwrap import unwrap
from prunella.planning.accounting import empty
from prunella.planning.plan import Plan
from prunella.registry.method import control, metric
from prunella.types import Mask


class Control(Enum):
    """Where the numbers of a control come from."""

    REINIT = "reinit"
    SHUFFLE = "shuffle"


Fresh = Callable[[nn.Module], object]
"""Gives a model new random weights in place."""


def reset_(model: nn.Module) -> nn.Module:
    """New weights by `reset_parameters()` of every module that owns parameters. RequestError if one has none."""
    for name, module in unwrap(model).named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is None and any(parameter is not None for parameter in module._parameters.values()):
            raise RequestError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters()",
                "its first weights cannot be drawn anew",
                "give that module the method, or pass Controls(fresh=...), a function that gives a model new weights",
            )
        if reset is not None and module._parameters:
            reset()
    return model


@dataclass(frozen=True)
class Controls:
    """Which controls are trained, after which rounds, and from which first weights.

    kinds: `REINIT` keeps the mask and draws new first weights; `SHUFFLE` keeps the weights and permutes each mask.
    rounds: numbers of rounds, from 1; none named is the last round only. fresh: gives a model new random weights.
    """

    kinds: tuple[Control, ...] = (Control.REINIT, Control.SHUFFLE)
    rounds: tuple[int, ...] = ()
    fresh: Fresh = reset_

    def due(self, number: int, last: int) -> bool:
        """Whether controls belong to this round."""
        return bool(self.kinds) and (number in self.rounds if self.rounds else number == last)


def reinit_(model: nn.Module, seed: int, fresh: Fresh = reset_) -> nn.Module:
    """Draw new weights from `seed` and apply the model's masks to them. Masks stay; the caller's generators stay."""
    with seeded(seed):
        fresh(model)
    return reapply_(model)


@control(source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2021, arXiv:2009.08576")
def reinitialized(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy with weights drawn anew by each module's own `reset_parameters`, under the same masks.

    The caller's random state is left as it was. seed: of the new weights. Errors: RequestError for parameters of
    modules that cannot draw them.

    Use: as the control of masks found at initialization or by tickets. Avoid: models whose weights were drawn by code
    of their own: the distribution then is torch's, not theirs.
    """
    return reinit_(copied(model), seed)


def shuffle_masks_(model: nn.Module, seed: int) -> nn.Module:
    """Permute the mask of every parameter: each keeps its number of survivors exactly. Weights are not touched."""
    masks: dict[nn.Parameter, Mask] = {}
    for name, parameter, packed in records(model):
        if parameter not in masks:
            masks[parameter] = _shuffled(packed.unpack(), f"{seed} {name}")
    if not masks:
        raise RequestError("the model carries no masks to shuffle", "", "call prunella.apply_(model, plan) first")
    forget_masks_(model)
    record_(model, masks)
    return model


@control(source="Su et al. 2020, arXiv:2009.11094; Frankle et al. 2021, arXiv:2009.08576")
def shuffled_plan(plan: Plan, *, seed: int = 0) -> Plan:
    """The plan with the mask of every layer shuffled: the same number of weights in each, at random places.

    `m'_l = m_l[permutation]`, drawn for each layer from `seed` and its name. What only depends on how many weights each
    layer keeps does not change. Patterns such as N:M or blocks are not kept up. seed: of the permutations.

    Use: as the control of a mask: if training from it is as good, only the layers' densities mattered. Avoid: plans
    that cut structure, which are refused.
    """
    if not plan.masks or plan.cuts:
        raise RequestError("there are no masks to shuffle", "the plan cuts structure, or nothing", "use Element()")
    return replace(plan, masks={name: _shuffled(mask, f"{seed} {name}") for name, mask in plan.masks.items()})


def _shuffled(mask: Mask, key: str) -> Mask:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    order = torch.randperm(mask.numel(), generator=generator)
    return mask.flatten()[order].view_as(mask)


@metric(source="Tanaka et al. 2020, arXiv:2006.05467 (layer collapse)")
def collapsed(subject: Plan | nn.Module) -> tuple[str, ...]:
    """Names of the layers of which nothing is left, so that their output no longer depends on their input.

    Of a plan: rows that keep 0. Of a model: weights with two axes or more whose values are all zero.

    Use: after every plan beyond 90 %, or with `min_units=0`. Avoid: as the only check: paths can be cut between layers
    that still have weights.
    """
    if isinstance(subject, Plan):
        return tuple(empty(subject.rows))
    weights = ((name, p) for name, p in unwrap(subject).named_parameters() if p.dim() > 1 and p.numel())
    return tuple(name.removesuffix(".weight") for name, p in weights if not bool(p.detach().any()))
