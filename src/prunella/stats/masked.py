"""Statistics of a masked network whose dense weights are preserved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunella.types import Mask


@dataclass(frozen=True)
class Before:
    """Masks of earlier rounds, by entity. nested: no masked weight may come back."""

    masks: Mapping[str, Mask] = field(default_factory=dict)
    nested: bool = True


@contextmanager
def masked(parameters: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> Iterator[None]:
    """Inside, masked weights are zero; afterwards their values are restored bit for bit."""
    dense = {name: parameters[name].detach().clone() for name in masks}
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
        yield
    finally:
        with torch.no_grad():
            for name, value in dense.items():
                parameters[name].copy_(value)


def behind(scores: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Scores by entity, with masked weights below all others of every layer; `masks` have the shape of scores."""
    lowest = min(float(value.min()) for value in scores.values())
    ranked = {}
    for name, value in scores.items():
        below = torch.nextafter(value.new_tensor(min(lowest, 0.0)), value.new_tensor(-torch.inf))
        below = below.clamp_max(-torch.finfo(value.dtype).tiny)
        ranked[name] = torch.where(masks[name], value, below) if name in masks else value
    return ranked
