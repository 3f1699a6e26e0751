"""The input of the solver of one block, `BlockProblem`, and its output, `BlockResult`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunella.graph.data import Layer
from prunella.llm.blocks import BlockCall, ModelBlock, StoreActivations
from prunella.llm.distributed import SINGLE_PROCESS, ProcessGroup
from prunella.llm.recipe import OneShot
from prunella.llm.refine import Refined
from prunella.model.trees import tensors
from prunella.types import Mask


@dataclass(frozen=True)
class Fit:
    """One layer: relative error of its outputs, pruned and total weights, calibration tokens, damping, seconds.

    skipped: why the layer was kept dense, empty if it was pruned.
    """

    name: str
    error: float = 0.0
    removed: int = 0
    total: int = 0
    tokens: int = 0
    damping: float = 0.0
    seconds: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: kept dense, {self.skipped}"
        return f"{self.name}: {self.removed / self.total:.1%} pruned, error {self.error:.3%} ({self.tokens} tokens)"


@dataclass(frozen=True)
class BlockProblem:
    """Everything that determines the result for one block.

    module: the block. layers: its layers to prune, by weight. calls: the inputs of the block in the pruned model.
    forward: the output of the block for one of them. targets: the outputs of the dense block for the refinement, one
    per call, empty without. store: stores the outputs of the refined block. first_solver: the rank that solves the
    first matrix; the processes take turns. held_out: number of last calls that are not fitted; they determine the
    strength, the fraction of the weights' change that is kept.
    """

    block: ModelBlock
    module: nn.Module
    layers: Mapping[nn.Parameter, Layer]
    calls: Sequence[BlockCall]
    forward: Callable[[BlockCall], Any]
    how: OneShot
    targets: Sequence[Tensor] = ()
    store: StoreActivations = list
    distributed: ProcessGroup = SINGLE_PROCESS
    first_solver: int = 0
    held_out: int = 0

    @property
    def fitted(self) -> int:
        """The number of calls to which the weights are fitted."""
        return len(self.calls) - self.held_out

    def output(self, k: int) -> Tensor:
        """The hidden states that the block returns for call `k`."""
        return tensors(self.forward(self.calls[k]))[0]


@dataclass(frozen=True)
class BlockResult:
    """The result for one block: its layers in order of execution, and the masks of their weights.

    refined: the errors of the block and its outputs, if it was refined. next_solver: the rank that solves next.
    strength: the kept fraction of the weights' change, if it was chosen on held-out batches.
    """

    fits: tuple[Fit, ...]
    masks: Mapping[nn.Parameter, Mask]
    refined: Refined | None = None
    next_solver: int = 0
    strength: float | None = None

    @property
    def outputs(self) -> Sequence[Tensor] | None:
        """The outputs of the pruned block, if they are known already."""
        return None if self.refined is None or self.strength is not None else self.refined.outputs
