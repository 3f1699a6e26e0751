"""Weights under torch's weight norm, `g * v / |v|`, by a hook or as a parametrization.

A unit is zero when its `g` is: zeros in its place in `v` would divide zero by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from prunella.model.unwrap import unwrap


class Scaled(NamedTuple):
    """The parameter `g`, and the axis of it and of `v` along which each position has a norm of its own."""

    scale: str
    axis: int


def scaled_by_norm(model: nn.Module) -> dict[str, Scaled]:
    """Parameter `v` -> its `g`. A norm of the full weight has no such axis and is left out."""
    return {v: entry for v, entry in _all(unwrap(model, computed=True)) if entry.axis >= 0}


def _all(model: nn.Module) -> Iterator[tuple[str, Scaled]]:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm):
            yield f"{prefix}original1", Scaled(f"{prefix}original0", module[0].dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield f"{prefix}{hook.name}_v", Scaled(f"{prefix}{hook.name}_g", hook.dim)
