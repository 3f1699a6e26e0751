"""Cuts of an ordinary `nn.Module`: axes of its parameters are cut, and its size attributes are set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunella.errors import RequestError
from prunella.graph.cut.block_surgery import drop_, number_, shorten_
from prunella.graph.cut.changes import Changes, Cuts, Sizes
from prunella.graph.nested_sizes import changed, sizes_in
from prunella.graph.trace.tracked_int import holder
from prunella.model.constants import constants_of
from prunella.model.trees import set_attribute


def change_(model: nn.Module, changes: Changes) -> None:
    """Apply all changes in place. Names are those of the dense model, so that blocks are removed last."""
    number_(model, changes.dropped)
    cut_(model, changes.cuts, changes.attributes)
    for (owner, name), removed in changes.lists.items():
        shorten_(holder(model, owner), name, removed)
    drop_(model, changes.dropped)


def cut_(model: nn.Module, cuts: Cuts, attributes: Sizes) -> None:
    """Cut in place: `cuts` is entity -> axis -> positions kept, `attributes` is (owner, name) -> new value.

    Dtype, device, memory format, `requires_grad` and ties do not change; `.grad` is cut with its parameter. Works on
    any device, meta included. An entity that is not in the model is a `RequestError`.
    """
    homes = _homes(model)
    for name, axes in cuts.items():
        if name not in homes:
            raise _misfit(name)
        places = homes[name]
        module, key = places[0]
        old = getattr(module, key)
        new = _cut_tensor(name, old, axes)
        for module, key in places:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            next(store for store in stores if key in store)[key] = new
    for (owner, key), value in attributes.items():
        place = holder(model, owner)
        set_attribute(place, key, _resized(getattr(place, key, None), value))
    touched = {id(module) for name in cuts for module, _ in homes[name]}
    for module in model.modules():
        if any(id(part) in touched for part in (module, *_parametrizations(module))):
            _describe(module)


def _resized(old: object, value: int | tuple[int, ...]) -> Any:
    """An attribute with new sizes: one, or those of a container in order."""
    many = value if isinstance(value, tuple) else (value,)
    if len(sizes_in(old)) == len(many):
        return changed(old, lambda k, _: many[k])
    return type(old)(many) if isinstance(old, tuple | list) else value


def _misfit(name: str) -> RequestError:
    return RequestError(
        f"the plan cuts {name}, which the model does not have in this shape",
        "the plan was made for another model",
        "make a plan of this model with prunella.plan",
    )


def _homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of each parameter, buffer and constant -> all places (module, key) of the same tensor."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in [*module._parameters.items(), *module._buffers.items(), *constants_of(module)]:
            if tensor is not None:
                names[f"{path}.{key}" if path else key] = id(tensor)
                if (module, key) not in places.setdefault(id(tensor), []):
                    places[id(tensor)].append((module, key))
    return {name: places[key] for name, key in names.items()}


@torch.no_grad()
def _cut_tensor(name: str, old: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    new = _select(name, old.detach(), axes)
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if old.grad is not None:
        parameter.grad = _select(name, old.grad, axes)
    return parameter


def _select(name: str, tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    for axis, kept in axes.items():
        if axis >= tensor.dim() or (len(kept) and int(kept.max()) >= tensor.shape[axis]):
            raise _misfit(name)
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


def _parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters a parametrized module computes its weights from."""
    if is_parametrized(module):
        yield from module.parametrizations.modules()  # type: ignore[union-attr]


@torch.no_grad()
def _describe(module: nn.Module) -> None:
    """Update the sizes and the list of weights that a torch module stores in addition to its weights."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hook(module, ())  # computes the weight, which is a plain attribute
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
    for key, value in _sizes(module):
        setattr(module, key, value)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _sizes(module: nn.Module) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    yield from _recurrent_sizes(module)
    yield from _attention_sizes(module)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        yield from (("out_features", weight.shape[0]), ("in_features", weight.shape[1]))
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        yield from (("in_channels", weight.shape[0]), ("out_channels", weight.shape[1] * module.groups))
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield from (("out_channels", weight.shape[0]), ("in_channels", weight.shape[1] * module.groups))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield ("num_features", weight.shape[0])
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield ("normalized_shape", tuple(weight.shape))
    elif isinstance(module, nn.GroupNorm):
        yield ("num_channels", weight.shape[0])
    elif isinstance(module, nn.Embedding):
        yield from (("num_embeddings", weight.shape[0]), ("embedding_dim", weight.shape[1]))
    elif isinstance(module, nn.PReLU):
        yield ("num_parameters", weight.shape[0])


def _attention_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Sizes that an attention module stores but its forward does not read, from its projections."""
    if isinstance(module, nn.MultiheadAttention):
        packed: Any = module.in_proj_weight
        for name in ("kdim", "vdim"):
            weight: Any = getattr(module, f"{name[0]}_proj_weight") if packed is None else packed
            if isinstance(weight, Tensor):
                yield name, weight.shape[1]


def _recurrent_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Sizes stored by recurrent layers and cells, from the parameters of the first layer."""
    if isinstance(module, nn.RNNBase):
        first = {name: getattr(module, f"weight_{name}_l0", None) for name in ("ih", "hh", "hr")}
    elif isinstance(module, nn.RNNCellBase):
        first = {"ih": module.weight_ih, "hh": module.weight_hh, "hr": None}
    else:
        return
    entering, repeated, projection = first.values()
    if isinstance(entering, Tensor) and isinstance(repeated, Tensor):
        yield "input_size", entering.shape[1]
        yield "hidden_size", repeated.shape[1] if projection is None else projection.shape[1]
        if projection is not None:
            yield "proj_size", projection.shape[0]
