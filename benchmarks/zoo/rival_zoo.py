"""Torch-Pruning 1.6.1 on the same models, judged by the same oracle.

It is used as its documentation says for a model that one does not know: random importance, the same 30 %, the layers
that make the output left out, nothing told about heads. `exact`: the smaller model equals the masked one. `differs`: it
runs, with outputs of the right shape, but computes something else. `broken`: it does not run, or gives other shapes.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import judge
import torch
import torch_pruning as tp
from exam import EXACT, SHARE, SINGLE, Build, Exam
from torch import nn

WEIGHTED = nn.Linear | nn.modules.conv._ConvNd


def examine(suite: str, name: str, build: Build) -> dict[str, Any]:
    """Try Torch-Pruning on one model."""
    warnings.simplefilter("ignore")
    model, inputs = build()
    judge.settle(model)
    before = judge.run(model, inputs)
    small = copy.deepcopy(model)
    facts: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    try:
        pruner = tp.pruner.BasePruner(
            small,
            inputs if isinstance(inputs, Mapping | torch.Tensor) else tuple(inputs),
            importance=tp.importance.RandomImportance(),
            pruning_ratio=SHARE,
            ignored_layers=_outputs(small, before),
            output_transform=judge_outputs,
        )
        pruner.step()
    except Exception as error:
        return asdict(
            Exam(suite, name, "Torch-Pruning", "traceback", f"{type(error).__name__}: {error}"[:200], **facts)
        )
    facts["prune_s"] = time.perf_counter() - start
    facts["params_left"] = sum(p.numel() for p in small.parameters()) / facts["params"]
    verdict, why = _verdict(model, small, inputs, before, facts)
    return asdict(Exam(suite, name, "Torch-Pruning", verdict, why, **facts))


def judge_outputs(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, which is what Torch-Pruning's tracer wants."""
    return [tensor for tensor in judge.tensors(output) if tensor.is_floating_point() and tensor.grad_fn is not None]


def _outputs(model: nn.Module, before: list[torch.Tensor]) -> list[nn.Module]:
    """Layers as wide as the last axis, or the channels, of an output."""
    wide = {t.shape[-1] for t in before if t.dim()} | {t.shape[1] for t in before if t.dim() == 4}
    found = []
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            found += [module] if size in wide else []
    return found


def _verdict(
    model: nn.Module, small: nn.Module, inputs: Any, before: list[torch.Tensor], facts: dict[str, Any]
) -> tuple[str, str]:
    if facts["params_left"] >= 1:
        return "refused", "nothing was removed"
    try:
        after = judge.run(small, inputs)
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}"[:200]
    if [t.shape for t in after] != [t.shape for t in before]:
        return "broken", f"outputs of shape {[tuple(t.shape) for t in after][:2]}"
    try:
        facts["error64"] = judge.error(model, small, inputs, wide=True)
        facts["error32"] = judge.error(model, small, inputs, wide=False)
    except Exception as error:
        return "differs", f"{type(error).__name__}: {error}"[:200]
    return ("exact", "") if facts["error64"] <= EXACT and facts["error32"] <= SINGLE else ("differs", "")
