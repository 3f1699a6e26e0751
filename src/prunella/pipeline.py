"""The whole pipeline: model -> graph -> groups -> criterion -> allocation -> keep and masks. Read this file first.

`plan()` only reads the model. `prunella.apply_` zeroes in place, `prunella.shrink` builds the smaller module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prunella.graph.structure import Frozen
from prunella.targets import Target

Loss = Callable[[nn.Module, Any], Tensor]
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Amount:
    """What a model weighs: parameters, multiply-adds of one pass over the example, bytes, non-zero prunable weights."""

    params: float
    macs: float
    bytes: float
    weights: float


@dataclass(frozen=True)
class Row:
    """One line of a plan: a group of units, or the mask of one weight."""

    name: str
    kind: str
    kept: int
    total: int
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float


@dataclass(frozen=True)
class Plan:
    """Frozen data: what to keep, where to cut, what was asked, what it will give.

    keep: group name -> bool over its units.          masks: parameter name -> bool of its shape (True is kept).
    cuts: entity -> axis -> kept positions (int64).   attributes: (owner, name) -> new value of a size attribute.
    weights: parameter name -> new values, for methods that change them. inputs: the example, for verification.
    """

    recipe: Mapping[str, Any]
    target: Target
    before: Amount
    after: Amount
    keep: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    cuts: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[tuple[str, str], int]
    rows: tuple[Row, ...]
    frozen: tuple[Frozen, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
