"""The result of an importer: masks and weights by the tool's names, before they are matched with a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.checkpoint import only_weights
from prunella.types import Mask

State = Mapping[str, Any]
"""A checkpoint as read: names and tensors, and other data that the tool stores with them."""


@dataclass(frozen=True)
class Imported:
    """Masks (True is kept) and weights by the tool's names of parameters, without the tool's own suffixes.

    origin: the tool.  remarks: the tool's own statements, such as the sparsity requested by its recipe.
    implied: the masks are inferred from zero weights, since the checkpoint has no masks.
    """

    origin: str
    masks: Mapping[str, Mask]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    implied: bool = False


def tensors_of(state: State) -> dict[str, Tensor]:
    """The named tensors of a checkpoint; those of the entry that holds the weights if they are one level down.

    Errors: BadInput if there are none, RequestError if several entries may be meant.
    """
    return only_weights(state, "the checkpoint")


def as_mask(value: object, name: str) -> Mask:
    """A mask from a tool's numbers: 1 is kept, 0 is pruned. Errors: BadInput for anything else."""
    if not isinstance(value, Tensor):
        raise BadInput(
            f"the mask of {name} is not a tensor", f"it is a {type(value).__name__}", "give the masks as saved"
        )
    if value.dtype is torch.bool:
        return value.detach().cpu()
    mask = value.detach().cpu() != 0
    if not bool(((value.detach().cpu() == 1) | ~mask).all()):
        odd = float(value.detach().cpu()[mask & (value.detach().cpu() != 1)][0])
        raise BadInput(f"the mask of {name} is not made of 0 and 1", f"it holds {odd:g}", "give the masks as saved")
    return mask


def zero_masks(weights: Mapping[str, Tensor], min_sparsity: float = 0.0) -> dict[str, Mask]:
    """Masks of the tensors of two axes or more that have zeros, and a sparsity above `min_sparsity`."""
    if not 0 <= min_sparsity < 1:
        raise RequestError(f"min_sparsity={min_sparsity:g} is out of range", "a fraction in [0, 1) is needed")
    masks = {}
    for name, value in weights.items():
        if value.dim() >= 2 and value.is_floating_point():
            mask = nonzero(value)
            share = int((~mask).sum()) / max(mask.numel(), 1)
            if share > min_sparsity:
                masks[name] = mask
    return masks


def nonzero(value: Tensor) -> Mask:
    """The mask of the nonzeros of a tensor; formats of eight bits have no comparison of their own."""
    wide = value.detach().cpu()
    return (wide.float() if wide.element_size() < 2 else wide) != 0
