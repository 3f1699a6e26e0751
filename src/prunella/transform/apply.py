"""Write a plan into a model in place; `model/masks.py` stores the masks on its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.constants import constants
from prunella.model.masks import forget_masks_, plain_weights_, reapply_, record_
from prunella.model.undo import writable
from prunella.model.unwrap import unwrap
from prunella.model.weight_norm import scaled_by_norm
from prunella.planning.plan import Plan
from prunella.types import Mask

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=Tensor)


def apply_(model: M, plan: Plan, *, regrow: bool = False) -> M:
    """Zero, in place, all weights that `plan` removes, store the masks, and return the model.

    First the values of `plan.weights` are copied into the model. Then masked weights become zero, as does every
    position on an axis of a parameter that `plan.cuts` does not keep. Buffers do not change, unless `plan.weights` has
    them. Under torch's weight norm a unit becomes zero by its scale, since a norm of zeros would divide by zero. The
    plan is checked against the model before anything is written.

    regrow: drop the masks of earlier plans, so that only this plan masks weights. By default masks accumulate.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 8), pr.Recipe(granularity=pr.Element())
        >>> plan = pr.plan(model, torch.randn(2, 8), recipe, target=pr.Sparsity(0.75))
        >>> masked = pr.apply_(model, plan)
        >>> masked is model, int(model.weight.count_nonzero())
        (True, 16)
    """
    root = unwrap(plain_weights_(model))
    named: dict[str, Tensor] = dict(root.named_buffers(remove_duplicate=False))
    named |= dict(root.named_parameters(remove_duplicate=False))
    weights = [(_parameter(named, name, new.shape), new) for name, new in plan.weights.items()]
    masks = plan_masks(root, plan)
    for parameter, new in weights:
        with writable(parameter):
            parameter.copy_(new)
    if regrow:
        forget_masks_(root)
    record_(root, masks)
    return reapply_(model)


def plan_masks(model: nn.Module, plan: Plan) -> dict[nn.Parameter, Mask]:
    """The masks of a plan, one bool mask per parameter; `RequestError` if the plan does not fit the model."""
    model = unwrap(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} | constants(model).keys()
    if plan.dropped:
        raise RequestError(
            f"the plan drops blocks of {', '.join(plan.dropped)}, which masks cannot do",
            "a block of zeros is not always the identity, for example after a norm",
            "call prunella.shrink(model, plan)",
        )
    masks: dict[nn.Parameter, Mask] = {}
    for name, mask in plan.masks.items():
        parameter = _parameter(named, name, mask.shape)
        masks[parameter] = _both(masks.get(parameter), mask.to(parameter.device, torch.bool))
    scaled = scaled_by_norm(model)
    for name, axes in plan.cuts.items():
        if name in buffers:
            continue
        parameter = _parameter(named, name, None)
        zeroed = {axis: kept for axis, kept in axes.items() if name not in scaled or axis != scaled[name].axis}
        masks[parameter] = _both(masks.get(parameter), _cut_mask(name, parameter, zeroed))
    return masks


def _both(first: Mask | None, second: Mask) -> Mask:
    return second if first is None else first & second


def _parameter(named: Mapping[str, T], name: str, shape: torch.Size | None) -> T:
    parameter = named.get(name)
    if parameter is None:
        raise RequestError(
            f"the plan names {name!r}, which is not a parameter of this model",
            "the plan was made for another model",
            "make a plan for this model",
        )
    if shape is not None and shape != parameter.shape:
        raise RequestError(
            f"the plan has shape {tuple(shape)} for {name}, the model {tuple(parameter.shape)}",
            "the plan was made for another model, or this model is already cut",
            "apply a plan to the model it was made for",
        )
    return parameter


def _cut_mask(name: str, parameter: nn.Parameter, axes: Mapping[int, Tensor]) -> Mask:
    mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    for axis, kept in axes.items():
        fits = axis < parameter.dim() and (kept.numel() == 0 or int(kept.max()) < parameter.shape[axis])
        if not fits:
            raise RequestError(
                f"the plan cuts axis {axis} of {name} beyond its shape {tuple(parameter.shape)}",
                "the plan was made for another model, or this model is already cut",
                "apply a plan to the model it was made for",
            )
        line = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
        line[kept.to(parameter.device)] = True
        mask &= line.reshape([-1 if i == axis else 1 for i in range(parameter.dim())])
    return mask
