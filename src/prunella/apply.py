"""Write a plan into a model in place, and keep the masks beside the weights.

How masks are kept. Each module that owns a masked parameter carries, in its plain `__dict__`, a small record: parameter
name -> `Packed` (one bit a weight, on the CPU). It is neither parameter nor buffer, so that `state_dict()` keeps its
keys and the bytes of the weights, and optimizers and `DistributedDataParallel` see the parameters they know. It is
ordinary data inside the module, so that `copy.deepcopy`, pickling and wrappers (`torch.compile`, data parallel) carry
it along, and a replaced submodule takes its masks away. A dictionary outside, keyed by module, would do none of this.
A tied tensor has one mask, recorded at every owner.

Nothing here runs during training: `prunella.Pruner` applies the masks again after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.pipeline import Plan
from prunella.types import Mask

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=Tensor)
RECORD = "_prunella_masks"


@dataclass(frozen=True)
class Packed:
    """A mask at one bit a weight."""

    bits: Tensor
    shape: tuple[int, ...]

    def unpack(self, device: torch.device | str = "cpu") -> Mask:
        """The mask as a bool tensor on `device`."""
        flat = np.unpackbits(self.bits.numpy(), count=int(np.prod(self.shape)))
        return torch.from_numpy(flat).view(torch.bool).reshape(self.shape).to(device)


def pack(mask: Mask) -> Packed:
    """A bool mask at one bit a weight, on the CPU."""
    return Packed(torch.from_numpy(np.packbits(mask.detach().cpu().numpy().ravel())), tuple(mask.shape))


def apply_(model: M, plan: Plan, *, regrow: bool = False) -> M:
    """Zero in place everything that `plan` removes, remember the masks, and return the model.

    New values of `plan.weights` are copied in first. Masked weights are then set to zero, and so is every position that
    `plan.cuts` does not keep on any axis of a parameter. Buffers are left as they are, unless `plan.weights` has them.
    The plan is checked against the model before anything is written.

    regrow: forget the masks of earlier plans, so that this plan alone says what is masked. By default masks add up.
    """
    root = unwrap(model)
    named: dict[str, Tensor] = dict(root.named_buffers(remove_duplicate=False))
    named |= dict(root.named_parameters(remove_duplicate=False))
    weights = [(_parameter(named, name, new.shape), new) for name, new in plan.weights.items()]
    masks = plan_masks(root, plan)
    with torch.no_grad():
        for parameter, new in weights:
            parameter.copy_(new)
    if regrow:
        forget_masks_(root)
    record_(root, masks)
    return reapply_(model)


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """Parameter name -> bool mask (True is kept) of every masked parameter; a tied one under all its names.

    Names are those of the bare model, without the prefixes of `torch.compile` and data-parallel wrappers.
    """
    return {name: packed.unpack() for name, _, packed in records(model)}


def reapply_(model: M) -> M:
    """Set every masked weight to zero again: for training loops without a `Pruner`."""
    with torch.no_grad():
        for _, parameter, packed in records(model):
            parameter.masked_fill_(~packed.unpack(parameter.device), 0)
    return model


def finalize(model: M) -> M:
    """Check that every masked weight is exactly zero, forget the masks, and return the model; no weight changes.

    `CheckFailed` if training has revived masked weights.
    """
    for name, parameter, packed in records(model):
        alive = int(torch.count_nonzero(parameter.detach()[~packed.unpack(parameter.device)]))
        if alive:
            raise CheckFailed(
                f"{alive} masked weights of {name} are not zero",
                "an optimizer step has revived them",
                "train with prunella.Pruner attached, or call reapply_(model) first",
            )
    forget_masks_(model)
    return model


def record_(model: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> None:
    """Remember `masks` beside the parameters, on top of the masks already there. Weights are not touched."""
    root = unwrap(model)
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


def records(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Packed]]:
    """Every mask as (name, parameter, packed mask); a tied parameter comes once per name."""
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for leaf, packed in module.__dict__.get(RECORD, {}).items():
            parameter = module._parameters.get(leaf)
            if parameter is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tuple(parameter.shape) != packed.shape:
                raise CheckFailed(
                    f"the mask of {name} has shape {packed.shape}, the parameter {tuple(parameter.shape)}",
                    "the parameter was cut or replaced after it was masked",
                    "call prunella.apply.slice_masks_(model, plan.cuts) after cutting",
                )
            yield name, parameter, packed


def saved_masks(model: nn.Module, state: Mapping[str, Tensor], kind: str = "bits") -> dict[nn.Parameter, Mask]:
    """The masks in a state: entries `KIND.NAME` of one bit a weight. Errors: RequestError where one fits no weight."""
    named = dict(unwrap(model).named_parameters(remove_duplicate=False))
    masks: dict[nn.Parameter, Mask] = {}
    for key, bits in state.items():
        start, _, name = key.partition(".")
        if start != kind:
            continue
        if name not in named or bits.dtype != torch.uint8 or bits.numel() != -(-named[name].numel() // 8):
            why, todo = f"{name} is not there or has another size", "load it into the same architecture"
            raise RequestError("the saved masks do not fit this model", why, todo)
        masks[named[name]] = Packed(bits, tuple(named[name].shape)).unpack(named[name].device)
    return masks


def slice_masks_(model: M, cuts: Mapping[str, Mapping[int, Tensor]]) -> M:
    """After the parameters of a masked model were cut physically, cut their masks by the same positions."""
    root = unwrap(model)
    done: dict[int, Packed] = {}
    for name, axes in cuts.items():
        prefix, _, leaf = name.rpartition(".")
        record = root.get_submodule(prefix).__dict__.get(RECORD, {})
        if leaf in record:
            mask = record[leaf].unpack()
            for axis, kept in axes.items():
                mask = mask.index_select(axis, kept.cpu())
            done[id(record[leaf])] = pack(mask)
    for module in root.modules():
        record = module.__dict__.get(RECORD, {})
        for leaf in [leaf for leaf, packed in record.items() if id(packed) in done]:
            record[leaf] = done[id(record[leaf])]
            if bool(record[leaf].unpack().all()):
                del record[leaf]
    return model


def plan_masks(model: nn.Module, plan: Plan) -> dict[nn.Parameter, Mask]:
    """What a plan removes from parameters, as one bool mask per parameter; `RequestError` if it does not fit."""
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if plan.dropped:
        raise RequestError(
            f"the plan drops blocks of {', '.join(plan.dropped)}, which no mask can do",
            "a block of zeros is not always the identity, after a norm for example",
            "call prunella.shrink(model, plan)",
        )
    masks: dict[nn.Parameter, Mask] = {}
    for name, mask in plan.masks.items():
        parameter = _parameter(named, name, mask.shape)
        masks[parameter] = _both(masks.get(parameter), mask.to(parameter.device, torch.bool))
    for name, axes in plan.cuts.items():
        if name in buffers:
            continue
        parameter = _parameter(named, name, None)
        masks[parameter] = _both(masks.get(parameter), _cut_mask(name, parameter, axes))
    return masks


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside `torch.compile` and data-parallel wrappers."""
    while True:
        if isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _both(first: Mask | None, second: Mask) -> Mask:
    return second if first is None else first & second


def _parameter(named: Mapping[str, T], name: str, shape: torch.Size | None) -> T:
    parameter = named.get(name)
    if parameter is None:
        raise RequestError(
            f"the plan names {name!r}, which is no parameter of this model",
            "the plan was made for another model",
            "make a plan for this model",
        )
    if shape is not None and shape != parameter.shape:
        raise RequestError(
            f"the plan has shape {tuple(shape)} for {name}, the model {tuple(parameter.shape)}",
            "the plan was made for another model, or this one is already cut",
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
                "the plan was made for another model, or this one is already cut",
                "apply a plan to the model it was made for",
            )
        line = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
        line[kept.to(parameter.device)] = True
        mask &= line.reshape([-1 if i == axis else 1 for i in range(parameter.dim())])
    return mask


def forget_masks_(model: nn.Module) -> None:
    """Forget all masks without a check; no weight changes."""
    for module in unwrap(model).modules():
        module.__dict__.pop(RECORD, None)
