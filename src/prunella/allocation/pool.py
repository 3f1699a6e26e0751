"""The input of an allocation: pools of units or weights that compete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunella.types import Scores


@dataclass(frozen=True)
class Pool:
    """The units of one group, or the weights of one layer, in the order of removal.

    scores: `(n,)` ascending. shape: of the weight that produces the units, output first; `erk` needs it.
    cost: of one unit in the unit of the target, with all other units present; 1 for weights and for `Sparsity`.
    topology: of the group, independent of its width; `isomorphic` compares groups of equal topology.
    """

    name: str
    scores: Scores
    shape: tuple[int, ...]
    cost: float = 1.0
    topology: str = ""

    @property
    def size(self) -> int:
        """Number of units or weights."""
        return len(self.scores)


Allocation = Callable[[Sequence[Pool]], list[Tensor]]
"""Pools -> one non-decreasing float64 vector of removal keys each. The lowest keys of all pools are removed first."""
