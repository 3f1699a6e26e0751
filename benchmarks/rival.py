"""Torch-Pruning 1.6.1, set up as its own benchmark does: many small steps until the MACs are reached.

`pruner.step()` has no budget in MACs; its authors' CIFAR benchmark asks for 400 steps up to full sparsity and stops at
the wished speed-up. The same is done here, with the final layer ignored and joint ranking.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import count_macs

Importance = Literal["group_norm", "taylor"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cut:
    """A pruned copy, and what Torch-Pruning was allowed to touch."""

    model: nn.Module
    macs: int
    steps: int
    scope: str


def rival_cut(
    model: nn.Module,
    example: Tensor,
    *,
    budget: float,
    importance: Importance,
    data: Iterable[Batch],
    inner_only: Callable[[nn.Module], list[nn.Module]],
) -> Cut:
    """Prune a copy to at most `budget` MACs.

    If that breaks the network it is tried again with the layers of `inner_only` kept whole: those that write into the
    residual stream.
    """
    data = list(data)
    try:
        return _cut(model, example, budget, importance, data, [], "all layers")
    except Exception as error:
        first = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    kept = inner_only
    return _cut(model, example, budget, importance, data, kept, f"inner layers only; all layers fail ({first})")


def _cut(
    model: nn.Module,
    example: Tensor,
    budget: float,
    importance: Importance,
    data: list[Batch],
    keep_whole: list[nn.Module] | Callable[[nn.Module], list[nn.Module]],
    scope: str,
) -> Cut:
    copied = copy.deepcopy(model).eval()
    ignored = [copied.linear, *(keep_whole(copied) if callable(keep_whole) else keep_whole)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = _pruner(copied, example, importance, ignored)
        for step in range(1, 401):
            if importance == "taylor":
                _accumulate(copied, data)
            pruner.step()
            macs = count_macs(copied, example)
            if macs <= budget:
                copied.zero_grad()
                return Cut(copied, macs, step, scope)
    raise RuntimeError(f"the budget of {budget:g} MACs was not reached in 400 steps: {macs:g}")


def _pruner(model: nn.Module, example: Tensor, importance: Importance, ignored: list[nn.Module]) -> tp.BasePruner:
    made = {"group_norm": tp.importance.GroupMagnitudeImportance(p=2), "taylor": tp.importance.GroupTaylorImportance()}
    kind = {"group_norm": tp.pruner.GroupNormPruner, "taylor": tp.pruner.BasePruner}
    return kind[importance](
        model,
        example,
        importance=made[importance],
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=ignored,
    )


def _accumulate(model: nn.Module, data: list[Batch]) -> None:
    """Gradients of the loss summed over the calibration batches, as Taylor importance reads them."""
    model.zero_grad()
    for x, y in data:
        cross_entropy(model(x), y).backward()
