"""Shrinkage of the weights' change of a block toward the dense weights, chosen on text of another source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.llm.distributed import ProcessGroup
from prunella.types import Mask

STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Kept fractions of the change of the remaining weights; 1: as solved, 0: their dense values."""


@torch.no_grad()
def shrink_change_(
    dense: Mapping[nn.Parameter, Tensor], masks: Mapping[nn.Parameter, Mask], error: Callable[[], float]
) -> float:
    """Set every parameter to `W + s (W' - W)`, zero where it is masked, with the `s` of least error; returns `s`.

    The new weights are fitted to the calibration text; on other text a part of their change is harmful. dense: the
    parameters `W` before the block was pruned; their present values are `W'`. error: of the block, on held-out batches.
    Among equally good strengths the largest is taken.
    """
    solved = {parameter: parameter.detach().clone() for parameter in dense}
    errors: dict[float, float] = {}
    for strength in STRENGTHS:
        _set_(dense, solved, masks, strength)
        errors[strength] = error()
    best = min(errors, key=lambda strength: (not errors[strength] <= errors[STRENGTHS[0]], errors[strength]))
    _set_(dense, solved, masks, best)
    return best


def not_fitted(batches: Iterable[Any], group: ProcessGroup) -> list[Any]:
    """The batches that are held out. Errors: NotSupported in several processes."""
    others = list(batches)
    if others and group.world_size > 1:
        what = "batches cannot be held out in several processes"
        raise NotSupported(what, "each process would choose its own strength", "give no Split, or run one process")
    return others


def calls_of(others: int, batches: int, calls: int) -> int:
    """Number of last calls of a block that belong to the last `others` batches, with equally many calls per batch."""
    return calls * others // batches


def _set_(
    dense: Mapping[nn.Parameter, Tensor],
    solved: Mapping[nn.Parameter, Tensor],
    masks: Mapping[nn.Parameter, Mask],
    strength: float,
) -> None:
    for parameter, value in dense.items():
        new = solved[parameter] if strength == 1 else torch.lerp(value, solved[parameter], strength)
        parameter.copy_(new if parameter not in masks else new.masked_fill(~masks[parameter], 0))
