"""Models under `torch.nn.utils.prune`, whose weights are computed from `weight_orig` and `weight_mask` in a hook.

Functions that read such a model work on a copy with plain weights and the same masks; functions that change it convert
it to plain weights first. Parameters remain the same objects, so that an optimizer continues to train them.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import prune

from prunella.model.copying import copied
from prunella.model.masks import record_
from prunella.model.unwrap import torch_pruned, unwrap

M = TypeVar("M", bound=nn.Module)


def plain_weights_(model: M) -> M:
    """Turn torch's pruning into plain weights with masks of prunella, in place; the model computes the same."""
    for module, name in torch_pruned(unwrap(model, computed=True)):
        mask = module._buffers[f"{name}_mask"]
        assert mask is not None
        kept = mask.to(torch.bool)
        order = list(module._parameters)
        prune.remove(module, name)  # type: ignore[no-untyped-call]
        names = [name if entry == f"{name}_orig" else entry for entry in order]
        module._parameters = {entry: module._parameters[entry] for entry in names}
        parameter = module._parameters[name]
        assert parameter is not None
        record_(module, {parameter: kept})
    return model


def with_plain_weights(model: nn.Module) -> nn.Module:
    """The bare model with plain weights: itself, or a copy with its gradients if it is under torch's pruning."""
    bare = unwrap(model, computed=True)
    if not torch_pruned(bare):
        return unwrap(bare)
    replica = copied(bare)
    for old, new in zip(bare.parameters(), replica.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return plain_weights_(replica)


def plain_names(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> its name once the weights are plain."""
    modules = {module: path for path, module in model.named_modules()}
    names: dict[str, str] = {}
    for module, name in torch_pruned(model):
        place = f"{modules[module]}.{name}" if modules[module] else name
        names[f"{place}_orig"] = place
    return names
