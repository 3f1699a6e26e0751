"""Statistics of a network some of whose weights are masked, while its dense values are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunella.types import Mask


@dataclass(frozen=True)
class Before:
    """What earlier rounds have masked, by entity. nested: none of it may come back."""

    masks: Mapping[str, Mask] = field(default_factory=dict)
    nested: bool = True


@contextmanager
def masked(parameters: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> Iterator[None]:
    """While entered, masked weights are zero; afterwards they have their values back, bit for bit."""
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
    """Scores by entity, those of masked weights below all others of every layer; `masks` have the shape of scores."""
    lowest = min(float(value.min()) for value in scores.values())
    found = {}
    for name, value in scores.items():
        last = torch.nextafter(torch.tensor(min(lowest, 0.0), dtype=value.dtype), torch.tensor(-torch.inf).to(value))
        last = last.clamp_max(-torch.finfo(value.dtype).tiny)
        found[name] = torch.where(masks[name], value, last) if name in masks else value
    return found
