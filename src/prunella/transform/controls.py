"""What a ticket is compared with: the same mask on other weights, and other masks on the same weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.model.masks import forget_masks_, reapply_, record_, records
from prunella.model.rng import seeded
from prunella.model.unwrap import unwrap
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
        if not list(module._parameters) or all(p is None for p in module._parameters.values()):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise RequestError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters()",
                "its first weights cannot be drawn anew",
                "pass Controls(fresh=...), a function that gives a model new weights",
            )
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


def shuffle_masks_(model: nn.Module, seed: int) -> nn.Module:
    """Permute the mask of every parameter: each keeps its number of survivors exactly. Weights are not touched."""
    masks: dict[nn.Parameter, Mask] = {}
    for name, parameter, packed in records(model):
        if parameter not in masks:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            mask = packed.unpack()
            order = torch.randperm(mask.numel(), generator=generator)
            masks[parameter] = mask.flatten()[order].view_as(mask)
    if not masks:
        raise RequestError("the model carries no masks to shuffle", "", "call prunella.apply_(model, plan) first")
    forget_masks_(model)
    record_(model, masks)
    return model
