"""Models under `torch.nn.utils.prune`, whose weights are computed from `weight_orig` and `weight_mask` in a hook.

Functions that read such a model work on a copy with plain weights and the same masks; functions that change it convert
it to plain weights first. Parameters remain the same objects, so that an optimizer continues to train them.
"""

from __future__ import annotations

from torch import nn

from prunella.model.copying import copied
from prunella.model.masks import plain_weights_
from prunella.model.unwrap import torch_pruned, unwrap


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
