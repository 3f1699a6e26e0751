"""Training goes on after a cut: the optimizer keeps what it remembers of the units that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import NotSupported, RequestError
from prunella.graph.cut.block_surgery import renamed
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan

_Axes = Mapping[int, Tensor]


def carry_(optimizer: Optimizer, dense: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Let `optimizer`, which trains `dense`, train `small = shrink(dense, plan)` from here on, in place.

    Every parameter of `dense` in its groups is replaced by that of `small` of the same name (or the new number of its
    block; those of dropped blocks leave the optimizer); state tensors (momentum, first and second moments, row and
    column factors) are cut with the same positions as the parameter, step counts stay. The next steps are those of a
    model that always had these sizes. Parameters of other models stay as they are.
    For a moving average of the weights cut the average too: `ema.module = shrink(ema.module, plan)`.

    Errors, before anything is changed: `RequestError` if no parameter of `dense` is in the optimizer or `small` lacks
    one, `NotSupported` for state whose shape does not follow the parameter's.
    """
    dense, small = unwrap(dense), unwrap(small)
    names = {parameter: name for name, parameter in dense.named_parameters()}
    every: dict[Tensor, list[str]] = {}
    for alias, tensor in dense.named_parameters(remove_duplicate=False):
        every.setdefault(tensor, []).append(alias)
    heirs = dict(small.named_parameters(remove_duplicate=False))
    held = [p for group in optimizer.param_groups for p in group["params"] if p in names]
    if not held:
        raise RequestError(
            "the optimizer trains no parameter of the dense model", "its groups hold others", "pass its own model"
        )
    moved: dict[Tensor, tuple[Tensor, dict[str, Any]]] = {}
    new, lost = renamed(dense, plan.dropped), list[Tensor]()
    for parameter in held:
        name = names[parameter]
        after = next((new[n] for n in every[parameter] if n in new), None)
        if after is None:
            lost.append(parameter)
            continue
        if after not in heirs:
            raise RequestError(f"the small model has no parameter {name}", "it was made from another model")
        state = optimizer.state.get(parameter, {})
        moved[parameter] = heirs[after], _cut_state(name, parameter, state, plan.cuts.get(name, {}))
    gone = {id(p) for p in lost}
    for group in optimizer.param_groups:
        group["params"] = [moved[p][0] if p in moved else p for p in group["params"] if id(p) not in gone]
    for parameter in lost:
        optimizer.state.pop(parameter, None)
    for parameter, (heir, state) in moved.items():
        if optimizer.state.pop(parameter, None) is not None:
            optimizer.state[heir] = state


def _cut_state(name: str, parameter: Tensor, state: Mapping[str, Any], axes: _Axes) -> dict[str, Any]:
    return {
        key: _cut(name, key, value, parameter.shape, axes) if isinstance(value, Tensor) and value.dim() else value
        for key, value in state.items()
    }


def _cut(name: str, key: str, value: Tensor, shape: torch.Size, axes: _Axes) -> Tensor:
    """A state tensor of the parameter's shape, or of size 1 along some axes, cut along the others."""
    if not axes or value.numel() == 1:
        return value
    if value.dim() != len(shape) or any(n not in (1, full) for n, full in zip(value.shape, shape, strict=True)):
        raise NotSupported(
            f"the optimizer's state {key!r} of {name} cannot be cut",
            f"its shape is {tuple(value.shape)}, the parameter's {tuple(shape)}",
            "start a new optimizer for the small model",
        )
    for axis, kept in axes.items():
        if value.shape[axis] == shape[axis]:
            value = value.index_select(axis, kept.to(value.device))
    return value.contiguous()
