"""Continue training after a cut: the optimizer keeps its state for the kept units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import NotSupported, RequestError
from prunella.graph.cut.block_surgery import renamed
from prunella.model.torch_masks import plain_names
from prunella.model.unwrap import bare_optimizer, unwrap
from prunella.planning.plan import Plan

_Axes = Mapping[int, Tensor]


def carry_(optimizer: Optimizer, dense: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Let `optimizer`, which trains `dense`, train `small = shrink(dense, plan)` from now on, in place.

    Every parameter of `dense` in the optimizer is replaced by the parameter of `small` with the same name, or with the
    new number of its block. Parameters of dropped blocks leave the optimizer. State tensors (momentum, first and second
    moments, row and column factors) are cut at the positions of the parameter; step counts do not change. The next
    steps are those of a model that always had these sizes. Parameters of other models do not change.
    For a moving average of the weights cut the average too: `ema.module = shrink(ema.module, plan)`.

    Errors, before anything is changed: `RequestError` if no parameter of `dense` is in the optimizer or `small` lacks
    one, `NotSupported` for a state tensor whose shape does not follow that of the parameter.
    """
    optimizer, dense, small = bare_optimizer(optimizer), unwrap(dense, computed=True), unwrap(small)
    bare = plain_names(dense)
    names = {parameter: bare.get(name, name) for name, parameter in dense.named_parameters()}
    aliases: dict[Tensor, list[str]] = {}
    for alias, tensor in dense.named_parameters(remove_duplicate=False):
        aliases.setdefault(tensor, []).append(bare.get(alias, alias))
    small_parameters = dict(small.named_parameters(remove_duplicate=False))
    trained = [p for group in optimizer.param_groups for p in group["params"] if p in names]
    if not trained:
        raise RequestError(
            "the optimizer trains no parameter of the dense model", "its groups hold others", "pass the model it trains"
        )
    carried: dict[Tensor, tuple[Tensor, dict[str, Any]]] = {}
    new_names, dropped = dict[str, str](), list[Tensor]()
    for name, new in renamed(dense, plan.dropped).items():
        new_names[bare.get(name, name)] = new.removesuffix("_orig") if name in bare else new
    for parameter in trained:
        name = names[parameter]
        new_name = next((new_names[n] for n in aliases[parameter] if n in new_names), None)
        if new_name is None:
            dropped.append(parameter)
            continue
        if new_name not in small_parameters:
            raise RequestError(
                f"the small model has no parameter {name}", "it is not the cut model", "pass shrink(dense, plan)"
            )
        state = optimizer.state.get(parameter, {})
        carried[parameter] = small_parameters[new_name], _cut_state(name, parameter, state, plan.cuts.get(name, {}))
    dropped_ids = {id(p) for p in dropped}
    for group in optimizer.param_groups:
        group["params"] = [carried[p][0] if p in carried else p for p in group["params"] if id(p) not in dropped_ids]
    for parameter in dropped:
        optimizer.state.pop(parameter, None)
    for parameter, (small_parameter, state) in carried.items():
        if optimizer.state.pop(parameter, None) is not None:
            optimizer.state[small_parameter] = state


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
            f"its shape is {tuple(value.shape)}, that of the parameter {tuple(shape)}",
            "start a new optimizer for the small model",
        )
    for axis, kept in axes.items():
        if value.shape[axis] == shape[axis]:
            value = value.index_select(axis, kept.to(value.device))
    return value.contiguous()
