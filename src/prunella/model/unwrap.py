"""The bare model inside its wrappers, so that every parameter has one name in the library."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from prunella.errors import NotSupported

_DISTRIBUTED = ("torch.distributed.fsdp", "torch.distributed._composable", "torch.distributed.tensor")
"""Packages of sharded modules and weights, by name only: an import takes a third of a second."""


def unwrap(model: nn.Module, *, sharded: bool = False) -> nn.Module:
    """The bare model inside its wrappers, nested in any order.

    Wrappers are those of `torch.compile`, `DataParallel`, `DistributedDataParallel` and `AveragedModel`. The names of
    parameters and modules, in plans, masks, patterns and files, are those of the bare model.
    sharded: accept weights sharded over processes. Errors: NotSupported for sharded weights otherwise.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if not sharded and _is_sharded(model):
        raise NotSupported(
            "the weights of this model are sharded over processes (FSDP)",
            "a process holds a part of each weight, and the choice of units needs all of it",
            "prune the model before it is sharded; recovery.hold_sharded_ then keeps its masks while FSDP2 trains it",
        )
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    """The module inside one wrapper; None for a module without a wrapper."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return compiled
    wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel)
    return model.module if wraps else None  # type: ignore[return-value]


def _is_sharded(model: nn.Module) -> bool:
    kinds = [type(model), *map(type, model.parameters())]
    return any(base.__module__.startswith(_DISTRIBUTED) for kind in {*kinds} for base in kind.__mro__)
