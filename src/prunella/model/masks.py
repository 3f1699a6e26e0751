"""Masks of a model's weights, stored on its modules.

Each module that owns a masked parameter has a small record in its plain `__dict__`: parameter name -> `Packed` (one bit
per weight, on the CPU). The record is neither a parameter nor a buffer. Therefore `state_dict()` does not change, and
optimizers and `DistributedDataParallel` see the same parameters as before. The record is ordinary data of the module.
Therefore `copy.deepcopy`, pickling and wrappers (`torch.compile`, data parallel) preserve it, and a replaced submodule
loses its masks. A dictionary outside the model, keyed by module, would do none of this. A tied tensor has one mask,
recorded at every owner.

This module does nothing during training: `prunella.Pruner` applies the masks again after each optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from prunella.errors import CheckFailed, RequestError
from prunella.model.undo import writable
from prunella.model.unwrap import RECORD as RECORD
from prunella.model.unwrap import torch_pruned, unwrap
from prunella.types import Mask

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Packed:
    """A mask of one bit per weight."""

    bits: Tensor
    shape: tuple[int, ...]

    def unpack(self, device: torch.device | str = "cpu") -> Mask:
        """The mask as a bool tensor on `device`."""
        flat = np.unpackbits(self.bits.numpy(), count=int(np.prod(self.shape)))
        return torch.from_numpy(flat).view(torch.bool).reshape(self.shape).to(device)


def pack(mask: Mask) -> Packed:
    """A bool mask as one bit per weight, on the CPU."""
    return Packed(torch.from_numpy(np.packbits(mask.detach().cpu().numpy().ravel())), tuple(mask.shape))


def record_(model: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> None:
    """Store `masks` for the parameters, combined with existing masks. Weights do not change."""
    root = unwrap(model, computed=True)
    before = {parameter: packed for _, parameter, packed in records(root)}
    for parameter, new in masks.items():
        mask = new & before[parameter].unpack(new.device) if parameter in before else new
        if bool(mask.all()):
            continue
        packed = pack(mask)
        for module in root.modules():
            for leaf, owned in module._parameters.items():
                if owned is parameter:
                    module.__dict__.setdefault(RECORD, {})[leaf] = packed


def records(model: nn.Module, *, sharded: bool = False) -> Iterator[tuple[str, nn.Parameter, Packed]]:
    """Every mask as (name, parameter, packed mask); a tied parameter under all its names. sharded: as for `unwrap`."""
    for prefix, module in unwrap(model, sharded=sharded, computed=True).named_modules(remove_duplicate=False):
        for leaf, packed in module.__dict__.get(RECORD, {}).items():
            parameter = module._parameters.get(leaf)
            if parameter is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tuple(parameter.shape) != packed.shape:
                raise CheckFailed(
                    f"the mask of {name} has shape {packed.shape}, the parameter {tuple(parameter.shape)}",
                    "the parameter was cut or replaced after it was masked",
                    "call prunella.model.masks.slice_masks_(model, plan.cuts) after cutting",
                )
            yield name, parameter, packed


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """Parameter name -> bool mask (True is kept) of every masked parameter; a tied parameter under all its names.

    Names are those of the bare model, without the prefixes of `torch.compile` and data-parallel wrappers. Masks of
    `torch.nn.utils.prune` count, under the names that the parameters have without it.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 8), pr.Recipe(granularity=pr.NM(2, 4))
        >>> model = pr.apply_(model, pr.plan(model, torch.randn(2, 8), recipe))
        >>> {name: float(mask.float().mean()) for name, mask in pr.masks_of(model).items()}
        {'weight': 0.5}
    """
    root = unwrap(model, sharded=True, computed=True)
    paths = {module: path for path, module in root.named_modules()}
    masks = {f"{paths[module]}.{leaf}".lstrip("."): _torch_mask(module, leaf) for module, leaf in torch_pruned(root)}
    return {**masks, **{name: packed.unpack() for name, _, packed in records(model, sharded=True)}}


def plain_weights_(model: M) -> M:
    """Turn torch's pruning into plain weights with masks of prunella, in place; the model computes the same."""
    for module, name in torch_pruned(unwrap(model, computed=True)):
        kept = _torch_mask(module, name)
        order = list(module._parameters)
        prune.remove(module, name)  # type: ignore[no-untyped-call]
        names = [name if entry == f"{name}_orig" else entry for entry in order]
        module._parameters = {entry: module._parameters[entry] for entry in names}
        parameter = module._parameters[name]
        assert parameter is not None
        record_(module, {parameter: kept})
    return model


def _torch_mask(module: nn.Module, name: str) -> Mask:
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    return mask.to(torch.bool)


def reapply_(model: M) -> M:
    """Set every masked weight to zero again: for training loops without a `Pruner`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> masked = pr.apply_(model, pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5)))
        >>> masked[0].weight.data += 1
        >>> int(pr.transform.reapply_(masked)[0].weight.count_nonzero())
        16
    """
    for _, parameter, packed in records(model):
        with writable(parameter):
            parameter.masked_fill_(~packed.unpack(parameter.device), 0)
    return model


def finalize(model: M) -> M:
    """Check that every masked weight is exactly zero, drop the masks, and return the model; no weight changes.

    Weights under `torch.nn.utils.prune` become plain parameters with the values that they have there.
    `CheckFailed` if training has revived masked weights. A model without masks is returned as it is, and a warning is
    logged: its masks were dropped already, or belong to another copy of it.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 8), pr.Recipe(granularity=pr.NM(2, 4))
        >>> model = pr.apply_(model, pr.plan(model, torch.randn(2, 8), recipe))
        >>> pr.masks_of(pr.finalize(model)), int(model.weight.count_nonzero())
        ({}, 32)
    """
    plain_weights_(model)
    if not any(True for _ in records(model)):
        log.warning("finalize: the model has no masks; they were dropped already, or belong to another copy of it")
    for name, parameter, packed in records(model):
        revived = int(torch.count_nonzero(parameter.detach()[~packed.unpack(parameter.device)]))
        if revived:
            raise CheckFailed(
                f"{revived} masked weights of {name} are not zero",
                "an optimizer step has revived them",
                "train with prunella.Pruner attached, or call reapply_(model) first",
            )
    forget_masks_(model)
    return model


def copy_masks_(source: nn.Module, target: M) -> M:
    """Give `target`, a replica of `source` such as a moving average of its weights, exactly the masks of `source`.

    Masked weights of the target become zero; its earlier masks are dropped. Averages of zeros stay zero, so that a
    moving average needs the masks again only when they change. Both may be wrapped. Errors: RequestError if a masked
    weight is missing in the target or has another shape.

    Example:

        >>> import torch, prunella as pr
        >>> from copy import deepcopy
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> average = deepcopy(model)
        >>> masked = pr.apply_(model, pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5)))
        >>> sorted(pr.masks_of(pr.transform.copy_masks_(masked, average)))
        ['0.weight', '2.weight']
    """
    named = dict(unwrap(target).named_parameters(remove_duplicate=False))
    masks: dict[nn.Parameter, Mask] = {}
    for name, _, packed in records(source):
        if name not in named or tuple(named[name].shape) != packed.shape:
            why = f"{name} is missing there or has another shape"
            raise RequestError("the masks do not fit the other model", why, "pass two copies of one model")
        masks[named[name]] = packed.unpack(named[name].device)
    forget_masks_(target)
    record_(target, masks)
    return reapply_(target)


def forget_masks_(model: nn.Module) -> None:
    """Drop all masks without a check; no weight changes."""
    for module in unwrap(model, sharded=True, computed=True).modules():
        module.__dict__.pop(RECORD, {}).clear()  # another tree over the same modules may see it too


def slice_masks_(model: M, cuts: Mapping[str, Mapping[int, Tensor]]) -> M:
    """Cut the masks of a model at the positions `cuts` of its already cut parameters."""
    root = unwrap(model)
    modules = dict(root.named_modules(remove_duplicate=False))
    cut_masks: dict[int, Packed] = {}
    for name, axes in cuts.items():
        prefix, _, leaf = name.rpartition(".")
        record = modules[prefix].__dict__.get(RECORD, {}) if prefix in modules else {}  # `cut_` refuses the name
        if leaf in record:
            mask = record[leaf].unpack()
            for axis, kept in axes.items():
                mask = mask.index_select(axis, kept.cpu())
            cut_masks[id(record[leaf])] = pack(mask)
    for module in root.modules():
        record = module.__dict__.get(RECORD, {})
        for leaf in [leaf for leaf, packed in record.items() if id(packed) in cut_masks]:
            record[leaf] = cut_masks[id(record[leaf])]
            if bool(record[leaf].unpack().all()):
                del record[leaf]
    return model


def saved_masks(model: nn.Module, state: Mapping[str, Tensor], kind: str = "bits") -> dict[nn.Parameter, Mask]:
    """The masks in a state: entries `KIND.NAME` of one bit per weight. Errors: RequestError if one fits no weight."""
    named = dict(unwrap(model).named_parameters(remove_duplicate=False))
    masks: dict[nn.Parameter, Mask] = {}
    for key, bits in state.items():
        start, _, name = key.partition(".")
        if start != kind:
            continue
        if name not in named or bits.dtype != torch.uint8 or bits.numel() != -(-named[name].numel() // 8):
            why, todo = f"{name} is missing or has another size", "load them into the same architecture"
            raise RequestError("the saved masks do not fit this model", why, todo)
        masks[named[name]] = Packed(bits, tuple(named[name].shape)).unpack(named[name].device)
    return masks
