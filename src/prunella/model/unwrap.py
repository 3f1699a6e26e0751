"""The bare model inside its wrappers, so that every parameter has one name in the library."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from prunella.errors import NotSupported, RequestError

_DISTRIBUTED = ("torch.distributed.fsdp", "torch.distributed._composable", "torch.distributed.tensor")
"""Packages of sharded modules and weights, by name only: an import takes a third of a second."""

WRAPPER_SEGMENTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Segments that wrappers of torch add to the names of parameters in any place."""
RECORD = "_prunella_masks"
"""The attribute of a module that holds its masks."""


def unwrap(model: nn.Module, *, sharded: bool = False, computed: bool = False) -> nn.Module:
    """The bare model inside its wrappers, nested in any order.

    Wrappers are those of `torch.compile`, `DataParallel`, `DistributedDataParallel` and `AveragedModel`. The names of
    parameters and modules, in plans, masks, patterns and files, are those of the bare model. Where parts of the model
    are compiled, it is a second tree over the same weights and modules, without the wrappers.
    sharded: accept weights sharded over processes. computed: accept weights under `torch.nn.utils.prune`. Errors:
    NotSupported for such weights otherwise.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    model = _without_compiled_parts(model)
    if not sharded and _is_sharded(model):
        raise NotSupported(
            "the weights of this model are sharded over processes (FSDP)",
            "a process holds a part of each weight, and the choice of units needs all of it",
            "prune the model before it is sharded; recovery.hold_sharded_ then keeps its masks while FSDP2 trains it",
        )
    if not computed and torch_pruned(model):
        raise NotSupported(
            "the weights of this model are computed by torch.nn.utils.prune",
            "a hook makes them from weight_orig and weight_mask before each forward pass",
            "call prunella.transform.plain_weights_(model) first: the masks stay, and the weights are plain",
        )
    return model


def eager(model: nn.Module) -> nn.Module:
    """The model without `torch.compile`, whose programs ignore hooks, but with its data-parallel wrapper."""
    parallel = nn.parallel.DistributedDataParallel
    while not isinstance(model, parallel) and (inner := _inner(model)) is not None:
        model = inner
    return model if isinstance(model, parallel) else _without_compiled_parts(model)


def torch_pruned(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules and names of the tensors that `torch.nn.utils.prune` computes."""
    pruned = []
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]
        pruned += [(module, hook._tensor_name) for hook in hooks]
    return pruned


def bare_optimizer(optimizer: object) -> Optimizer:
    """The optimizer that steps the weights, inside wrappers such as those of accelerate (and so of the Trainer).

    A wrapper holds an optimizer with the very same parameter groups, under any name. Errors: RequestError for an object
    without step hooks, since its steps cannot be observed.
    """
    while (inner := _inner_optimizer(optimizer)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
        raise RequestError(
            f"the steps of a {type(optimizer).__name__} cannot be followed",
            "it is not a torch.optim.Optimizer, and holds none with its parameter groups",
            "pass the torch optimizer inside it",
        )
    return optimizer


def bare_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, each without its wrappers."""
    several: Any = [optimizers] if hasattr(optimizers, "param_groups") else optimizers
    return [bare_optimizer(each) for each in several]


def _inner_optimizer(optimizer: object) -> Optimizer | None:
    groups = getattr(optimizer, "param_groups", None)
    held = (value for value in getattr(optimizer, "__dict__", {}).values() if value is not optimizer)
    return next((value for value in held if isinstance(value, Optimizer) and value.param_groups is groups), None)


def _inner(model: nn.Module) -> nn.Module | None:
    """The module inside one wrapper; None for a module without a wrapper."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return compiled
    wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel)
    return model.module if wraps else None  # type: ignore[return-value]


def _without_compiled_parts(model: nn.Module) -> nn.Module:
    """The model, or another tree over the same modules if `torch.compile` wraps modules inside it.

    Modules above a wrapper are new objects with the attributes, parameters, buffers and masks of the old ones, so that
    the caller's model remains compiled; all other modules are the same objects.
    """
    if any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module) or _compiled(module) for module in model.modules()
    ):
        return _bare_tree(model, {})
    return model


def _compiled(module: nn.Module) -> Any:
    """The method behind `module.forward = torch.compile(module.forward)`; None for any other module."""
    original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    return original if isinstance(original, MethodType) and original.__self__ is module else None


def _bare_tree(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    if id(module) not in done:
        done[id(module)] = module  # a module that holds itself
        children = {name: None if child is None else _bare_tree(child, done) for name, child in module._modules.items()}
        if _compiled(module) or any(child is not module._modules[name] for name, child in children.items()):
            done[id(module)] = _with_children(module, children)
    return done[id(module)]


def _with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    vars(module).setdefault(RECORD, {})  # so that both see the masks that are set on either
    bare = type(module).__new__(type(module))
    vars(bare).update(vars(module), _modules=children)
    forward = _compiled(module) or vars(module).get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        vars(bare)["forward"] = MethodType(forward.__func__, bare)
    return bare


def _is_sharded(model: nn.Module) -> bool:
    kinds = [type(model), *map(type, model.parameters())]
    return any(base.__module__.startswith(_DISTRIBUTED) for kind in {*kinds} for base in kind.__mro__)
