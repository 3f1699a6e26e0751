"""Torch-Pruning 1.6.1, set up as its own CIFAR benchmark does: many small steps until the MACs are reached.

`pruner.step()` takes no budget in MACs. Its authors ask for 400 steps up to full sparsity, with joint ranking over
layers and the final layer ignored, and stop at the wished speed-up; that is done here. For Taylor importance gradients
are computed anew before each step, of which there are 100, since every one costs a backward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import count_macs

Importance = Literal["group_norm", "taylor"]
Batch = tuple[Tensor, Tensor]
STEPS: dict[Importance, int] = {"group_norm": 400, "taylor": 20}


@dataclass(frozen=True)
class Cut:
    """A pruned copy, and what Torch-Pruning was allowed to touch."""

    model: nn.Module
    scope: str


def rival_cut(
    model: nn.Module,
    example: Tensor,
    *,
    budget: float,
    importance: Importance,
    data: Iterable[Batch],
    spare: Sequence[str],
) -> Cut:
    """Prune a copy to at most `budget` MACs.

    If that breaks the network, it is tried again with the modules of `spare` kept dense: those that write into the
    residual stream.
    """
    data = list(data)
    try:
        return Cut(_cut(model, example, budget, importance, data, ()), "all layers")
    except Exception as error:
        first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    scope = f"inner layers only, since all layers fail with {first}"
    return Cut(_cut(model, example, budget, importance, data, spare), scope)


def _cut(
    model: nn.Module, example: Tensor, budget: float, importance: Importance, data: list[Batch], spare: Sequence[str]
) -> nn.Module:
    small = copy.deepcopy(model).eval()
    ignored = [small.get_submodule(name) for name in ("linear", *spare)]
    steps = STEPS[importance]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = _pruner(small, example, importance, ignored)
        for _ in range(steps):
            if importance == "taylor":
                _accumulate(small, data)
            pruner.step()
            if count_macs(small, example) <= budget:
                small.zero_grad()
                return small
    raise RuntimeError(f"{budget:g} MACs were not reached in {steps} steps")


def _pruner(model: nn.Module, example: Tensor, importance: Importance, ignored: list[nn.Module]) -> tp.BasePruner:
    made = {"group_norm": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    kind = {"group_norm": tp.pruner.GroupNormPruner, "taylor": tp.pruner.BasePruner}
    return kind[importance](
        model,
        example,
        importance=made[importance](),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS[importance],
        ignored_layers=ignored,
    )


def _accumulate(model: nn.Module, data: list[Batch]) -> None:
    """Gradients of the loss summed over the calibration batches, as Taylor importance reads them."""
    model.zero_grad()
    for x, y in data:
        cross_entropy(model(x), y).backward()
