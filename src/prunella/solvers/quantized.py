"""Pruning and rounding in one pass over the columns, each error made up for by the columns to come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, relative_error
from prunella.solvers.sparsegpt import by_columns
from prunella.types import Gram, Weight


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits`, sign included, times a scale: symmetric, so that zero stays zero.

    group: columns that share a scale in a row, None for the whole row. The scale is `max |w| / (2^(bits - 1) - 1)` of
    the weights as they are when the first of these columns is reached. bits: 2 to 24; 8 and 4 are usual.
    """

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24 or (self.group is not None and self.group < 1):
            raise RequestError(
                f"{self} is no grid", "bits from 2 to 24, and groups of at least 1 column", "Grid(4, 128)"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def scale(self, weight: Tensor) -> Tensor:
        """One scale for each row, `(out, 1)`; 1 for rows of zeros."""
        largest = weight.abs().amax(1, keepdim=True) / self.top
        return torch.where(largest > 0, largest, torch.ones_like(largest))

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """The nearest values of the grid."""
        return (values / scale).round().clamp(-self.top, self.top) * scale


@dataclass(frozen=True)
class OnGrid(Solved):
    """What was solved, with the scales that make whole numbers of it.

    scale: `(out, groups)`, in float64; column j belongs to group `j // group`. codes: `weight / scale`, whole numbers.
    """

    scale: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    group: int = 1

    @property
    def codes(self) -> Tensor:
        """`(out, in)`, int32; 0 where nothing is kept."""
        wide = self.scale.repeat_interleave(self.group, 1)[:, : self.weight.shape[1]]
        return (self.weight.double() / wide).round().int()


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774; Frantar et al. 2023, arXiv:2210.17323 (GPTQ)")
def prune_and_quantize(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    grid: Grid = Grid(),
    block: int = 128,
    damping: float = 0.01,
) -> OnGrid:
    """Prune a layer and round what stays, jointly: columns to come make up for zeros and for rounding alike.

    As `sparsegpt`, and a weight that stays becomes `q(w) = s * round(w / s)`: the rest of its row changes by
    `-((w - q(w)) / U_jj) U_j,j+1:`. With sparsity 0 it is rounding with feedback as in GPTQ; on an endlessly fine grid
    it is `sparsegpt`, but for weights that outgrow the largest code. Weights that stay may round to 0 too: `mask` says
    what was pruned.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity, block, damping: as in `sparsegpt`. grid: bits and scales. The result has `codes` and `scale` as well.

    Use: a layer that is to be sparse and of 8 or 4 bits. Avoid: before further training: rounding would be lost.
    """
    checked(weight, gram, pattern, sparsity)
    width = grid.group or weight.shape[1]
    scales: list[Tensor] = []

    def settle(left: Tensor, column: int) -> Tensor:
        if column % width == 0:
            scales.append(grid.scale(left[:, column : column + width]))
        return grid.round(left[:, column : column + 1], scales[-1])[:, 0]

    # A group that spans blocks would have its scale from columns that have not heard of the errors before them.
    size = -(-block // grid.group) * grid.group if grid.group and block > 0 else block
    found, mask, used = by_columns(weight, gram, pattern, sparsity, size, damping, settle)
    error = relative_error(weight, found, gram)
    return OnGrid(found, mask, error, used, torch.cat(scales, 1), width)
