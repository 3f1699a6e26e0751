"""Controls of a mask: empty layers, the same mask on other weights, and other masks on the same weights.

A method must beat its controls. Otherwise only the density of each layer matters, and not the choice of weights.
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
    """The kinds of controls."""

    REINIT = "reinit"
    SHUFFLE = "shuffle"


Fresh = Callable[[nn.Module], object]
"""Gives a model new random weights in place."""


def reset_(model: nn.Module) -> nn.Module:
    """New weights by `reset_parameters()` of every module with parameters. RequestError if a module lacks it."""
    for name, module in unwrap(model).named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is None and any(parameter is not None for parameter in module._parameters.values()):
            raise RequestError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters()",
                "its initial weights cannot be drawn again",
                "add the method, or pass Controls(fresh=...), a function that gives a model new weights",
            )
        if reset is not None and module._parameters:
            reset()
    return model


@dataclass(frozen=True)
class Controls:
    """Which controls are trained, after which rounds, and from which initial weights.

    kinds: `REINIT` keeps the mask and draws new initial weights; `SHUFFLE` keeps the weights and permutes each mask.
    rounds: numbers of rounds, from 1; empty means the last round only. fresh: gives a model new random weights.
    """

    kinds: tuple[Control, ...] = (Control.REINIT, Control.SHUFFLE)
    rounds: tuple[int, ...] = ()
    fresh: Fresh = reset_

    def due(self, number: int, last: int) -> bool:
        """Whether controls belong to this round."""
        return bool(self.kinds) and (number in self.rounds if self.rounds else number == last)


def reinit_(model: nn.Module, seed: int, fresh: Fresh = reset_) -> nn.Module:
    """Draw new weights from `seed` under the masks of the model. Masks and the caller's generators do not change.

    fresh: gives a model new random weights in place.
    """
    with seeded(seed):
        fresh(model)
    return reapply_(model)


@control(source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2021, arXiv:2009.08576")
def reinitialized(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy with new weights by `reset_parameters` of each module, under the same masks.

    The caller's random state does not change. seed: of the new weights. Errors: RequestError for parameters of
    modules without this method.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> masked = pr.apply_(model, pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5)))
        >>> fresh = pr.transform.reinitialized(masked)
        >>> torch.equal(fresh[0].weight != 0, masked[0].weight != 0)
        True

    Use: as the control of masks found at initialization or by tickets. Avoid: models with an initialization of their
    own: the new weights have torch's distribution.
    """
    return reinit_(copied(model), seed)


def shuffle_masks_(model: nn.Module, seed: int) -> nn.Module:
    """Permute the mask of every parameter. The number of kept weights and their values do not change.

    Errors: RequestError for a model without masks.
    """
    masks: dict[nn.Parameter, Mask] = {}
    for name, parameter, packed in records(model):
        if parameter not in masks:
            masks[parameter] = _shuffled(packed.unpack(), f"{seed} {name}")
    if not masks:
        why = "no plan was applied"
        raise RequestError("the model has no masks to shuffle", why, "call prunella.apply_(model, plan) first")
    forget_masks_(model)
    record_(model, masks)
    return model


@control(source="Su et al. 2020, arXiv:2009.11094; Frankle et al. 2021, arXiv:2009.08576")
def shuffled_plan(plan: Plan, *, seed: int = 0) -> Plan:
    """The plan with the mask of every layer shuffled: the same number of weights per layer, at random positions.

    `m'_l = m_l[permutation]`, drawn for each layer from `seed` and its name. The density of each layer does not change.
    Patterns such as N:M or blocks are lost. seed: of the permutations.
    Errors: RequestError for a plan without masks.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> plan = pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
        >>> shuffled = pr.transform.shuffled_plan(plan, seed=1)
        >>> int(plan.masks["0.weight"].sum()), int(shuffled.masks["0.weight"].sum())
        (16, 16)

    Use: as the control of a mask: if training from the shuffled mask is as good, only the densities of the layers
    matter. Avoid: plans with cuts, which are refused.
    """
    if not plan.masks or plan.cuts:
        raise RequestError("the plan has no masks to shuffle", "it cuts units, or removes nothing", "use Element()")
    return replace(plan, masks={name: _shuffled(mask, f"{seed} {name}") for name, mask in plan.masks.items()})


def _shuffled(mask: Mask, key: str) -> Mask:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    order = torch.randperm(mask.numel(), generator=generator, device="cpu")
    return mask.flatten()[order].view_as(mask)


@metric(source="Tanaka et al. 2020, arXiv:2006.05467 (layer collapse)")
def collapsed(subject: Plan | nn.Module) -> tuple[str, ...]:
    """Names of the empty layers, whose output no longer depends on their input.

    For a plan: rows that keep 0. For a model: weights of two or more axes with only zeros.
    subject: a plan or a model.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> _ = model[0].weight.data.zero_()
        >>> pr.transform.collapsed(model)
        ('0',)

    Use: after every plan beyond 90 %, or with `min_units=0`. Avoid: as the only check, since paths may end between
    layers that still have weights.
    """
    if isinstance(subject, Plan):
        return tuple(empty(subject.rows))
    weights = ((name, p) for name, p in unwrap(subject).named_parameters() if p.dim() > 1 and p.numel())
    return tuple(name.removesuffix(".weight") for name, p in weights if not bool(p.detach().any()))
