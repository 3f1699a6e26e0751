"""Torch-Pruning 1.6.1 at its best: joint ranking by group norms in 400 steps, stopped just within the budget.

`pruner.step()` takes no budget in MACs. Its authors ask for 400 steps up to full sparsity, with the final layer
ignored, and stop at the wished speed-up; that is done here. The last step is then bisected in `pruning_ratio`, so that
what the budget allows is not left unused. Only `step()` and the construction count as its time, not the counting.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch_pruning as tp
from torch import Tensor, nn
from training import count_macs

STEPS, HALVINGS = 400, 5


@dataclass(frozen=True)
class Cut:
    """A pruned copy, what Torch-Pruning was allowed to touch, and its CPU seconds."""

    model: nn.Module
    scope: str
    seconds: float


@dataclass
class _Pruner:
    """One run of steps up to `ratio`."""

    dense: nn.Module
    example: Tensor
    ignored: Sequence[str]
    ratio: float = 1.0
    steps: int = STEPS
    seconds: float = 0.0
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.dense).eval()
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._pruner = tp.pruner.GroupNormPruner(
                self.model,
                self.example,
                importance=tp.importance.GroupMagnitudeImportance(),
                global_pruning=True,
                pruning_ratio=self.ratio,
                iterative_steps=self.steps,
                ignored_layers=[self.model.get_submodule(name) for name in self.ignored],
            )
        self.seconds += time.process_time() - start

    def within(self, budget: float) -> int:
        """Step until the MACs are within the budget; the number of steps. Errors: RuntimeError if they never are."""
        for step in range(1, self.steps + 1):
            start = time.process_time()
            self._pruner.step()
            self.seconds += time.process_time() - start
            if count_macs(self.model, self.example) <= budget:
                return step
        raise RuntimeError(f"{budget:g} MACs were not reached in {self.steps} steps")


def rival_cut(dense: nn.Module, example: Tensor, *, budget: float, last: str, spare: Sequence[str]) -> Cut:
    """Prune a copy to at most `budget` MACs. last: the layer that is ignored.

    If that breaks the network, it is tried again with the modules of `spare` kept dense: those that write into the
    residual stream.
    """
    try:
        return _cut(dense, example, budget, [last], "all layers")
    except Exception as error:
        first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    kept = [name for name, _ in dense.named_modules() if any(fnmatchcase(name, pattern) for pattern in spare)]
    return _cut(dense, example, budget, [last, *kept], f"inner layers only, since all layers fail with {first}")


def _cut(dense: nn.Module, example: Tensor, budget: float, ignored: Sequence[str], scope: str) -> Cut:
    walk = _Pruner(dense, example, ignored)
    steps = walk.within(budget)
    best, low, high = walk, (steps - 1) / STEPS, steps / STEPS
    for _ in range(HALVINGS if steps > 1 and count_macs(walk.model, example) < 0.995 * budget else 0):
        ratio = (low + high) / 2
        trial = _Pruner(dense, example, ignored, ratio, steps)
        try:
            trial.within(budget)
        except RuntimeError:
            low = ratio
            continue
        high = ratio
        if count_macs(trial.model, example) > count_macs(best.model, example):
            best = trial
    best.model.zero_grad()
    return Cut(best.model, scope, walk.seconds)
