"""Masks of torch's own tools: `torch.nn.utils.prune` and `torch.ao.pruning`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from prunella.errors import BadInput
from prunella.io.importers.imported import Imported, State, as_mask, tensors_of
from prunella.registry.method import importer

_ORIGINAL = re.compile(r"^(?:(?P<module>.+)\.)?parametrizations\.(?P<leaf>[^.]+)\.original$")
_FAKE = re.compile(r"^(?:(?P<module>.+)\.)?parametrizations\.(?P<leaf>[^.]+)\.\d+\.mask$")


@importer(source="torch.nn.utils.prune of PyTorch, documentation and state dicts of release 2.13")
def torch_prune(state: State) -> Imported:
    """Masks that `torch.nn.utils.prune` stores next to the weights, of a module or of its state dict.

    `W = W_orig * W_mask`: a parameter `weight` is stored as `weight_orig` and `weight_mask`. The weights of the plan
    are the originals, so that masked weights can be regrown. Every mask needs an original of its shape.
    Data: none.
    Errors: BadInput for a mask without its original, or of another shape.

    Example:

        >>> import torch, prunella as pr
        >>> layer = torch.nn.utils.prune.random_unstructured(torch.nn.Linear(4, 2), "weight", amount=0.5)
        >>> int(pr.importers.torch_prune(layer.state_dict()).masks["weight"].sum())
        4

    Use: models pruned in PyTorch and not made permanent by `prune.remove`. Avoid: after `prune.remove`, which leaves
    only zeros: use `zeros`.
    """
    tensors = tensors_of(state)
    masks, weights = {}, {name: value for name, value in tensors.items() if not name.endswith(("_orig", "_mask"))}
    for key in (name for name in tensors if name.endswith("_orig")):
        name = key.removesuffix("_orig")
        if f"{name}_mask" not in tensors:
            weights[key] = tensors[key]  # a parameter that happens to have such a name
            continue
        weights[name], masks[name] = tensors[key], as_mask(tensors[f"{name}_mask"], name)
        _same(name, tensors[key], masks[name])
    alone = [n for n in tensors if n.endswith("_mask") and n.removesuffix("_mask") not in masks]
    for key in alone:  # masks without their original, or buffers that have such a name
        if f"{key.removesuffix('_mask')}.weight" in tensors or key.removesuffix("_mask") in tensors:
            raise BadInput(f"{key} has no weight", f"{key.removesuffix('_mask')}_orig is missing")
        weights[key] = tensors[key]
    return Imported("torch.nn.utils.prune", masks, weights)


@importer(source="torch.ao.pruning of PyTorch, documentation and sparsifiers of release 2.13")
def torch_ao(state: State) -> Imported:
    """Masks of `torch.ao.pruning`: of a module that a sparsifier has prepared, or of the sparsifier's own state.

    `W = W_original * mask`: a prepared module has `parametrizations.weight.original` and a mask in
    `parametrizations.weight.0.mask`. Its `state_dict()` leaves the mask out, so that a file of it needs the
    sparsifier's `state_dict()` too: give that as `masks=`. The latter is `{"state": {name: {"mask": ...}}, ...}`.
    Data: none.
    Errors: BadInput for a mask without its weight, or masks that are missing.

    Use: models that a sparsifier prepared, before or after `squash_mask`. Avoid: a state dict without the sparsifier's
    if masks were not squashed: its masks are unknown, and it is refused.
    """
    entries = state.get("state")
    if isinstance(entries, Mapping) and "groups" in state:
        masks = {}
        for name, entry in entries.items():
            if not isinstance(entry, Mapping) or "mask" not in entry:
                raise BadInput(f"the sparsifier has no mask of {name}", "its state is not that of a sparsifier")
            masks[str(name)] = as_mask(entry["mask"], str(name))
        return Imported("torch.ao.pruning", masks)
    tensors = tensors_of(state)
    weights, masks = {}, {}
    for key, value in tensors.items():
        original, fake = _ORIGINAL.match(key), _FAKE.match(key)
        if original:
            weights[_name(original)] = value
        elif fake:
            mask = as_mask(value, _name(fake))
            masks[_name(fake)] = mask & masks[_name(fake)] if _name(fake) in masks else mask
        else:
            weights[key] = value
    lone = [name for name in masks if name not in weights]
    if lone:
        raise BadInput(f"the mask of {lone[0]} has no weight", "its parametrization has no original")
    for name, mask in masks.items():
        _same(name, weights[name], mask)
    return Imported("torch.ao.pruning", masks, weights)


def needs_masks(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are parametrized and their masks are not there."""
    return any(map(_ORIGINAL.match, state)) and not any(map(_FAKE.match, state))


def _name(match: re.Match[str]) -> str:
    return f"{match['module']}.{match['leaf']}" if match["module"] else match["leaf"]


def _same(name: str, weight: Tensor, mask: Tensor) -> None:
    if weight.shape != mask.shape:
        why = f"the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}"
        raise BadInput(f"the mask of {name} does not fit its weight", why, "write the checkpoint again")
