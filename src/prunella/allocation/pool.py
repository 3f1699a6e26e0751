"""What an allocation sees: pools of units or weights that compete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunella.types import Scores


@dataclass(frozen=True)
class Pool:
    """The units of one group, or the weights of one layer, in the order in which they would be removed.

    scores: `(n,)` ascending.     shape: of the weight that produces them, output first, as `erk` needs it.
    cost: what one unit weighs in the target's unit while all others are there; 1 for weights and for `Sparsity`.
    alike: of what structure the group is, whatever its width; `isomorphic` compares groups where it is the same.
    """

    name: str
    scores: Scores
    shape: tuple[int, ...]
    cost: float = 1.0
    alike: str = ""

    @property
    def size(self) -> int:
        """How many compete."""
        return len(self.scores)


Allocation = Callable[[Sequence[Pool]], list[Tensor]]
"""Pools -> for each a float64 vector of removal keys, non-decreasing; all keys are merged, the lowest go first."""
