"""Pruning and rounding in one pass over the columns; later columns compensate for each error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.model.device import full_float32
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, relative_error
from prunella.solvers.sparsegpt import by_columns
from prunella.types import Gram, Weight


@dataclass(frozen=True)
class Grid:
    """Integers of `bits`, sign included, times a scale: symmetric, so that zero is exact.

    group: columns that share a scale in a row, None for the whole row. The scale is `max |w| / (2^(bits - 1) - 1)` of
    the weights at the time of the first of these columns. bits: 2 to 24; 8 and 4 are usual.
    """

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24 or (self.group is not None and self.group < 1):
            raise RequestError(
                f"{self} is out of range",
                "bits from 2 to 24, and groups of at least 1 column",
                "for example Grid(4, 128)",
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
    """A solution on a grid, with its scales.

    scale: `(out, groups)`, in float64; column j belongs to group `j // group`. codes: `weight / scale`, integers.
    """

    scale: Tensor = field(default_factory=lambda: torch.ones(1, 1, device="cpu"))
    group: int = 1

    @property
    def codes(self) -> Tensor:
        """`(out, in)`, int32; 0 where the mask is False."""
        scales = self.scale.repeat_interleave(self.group, 1)[:, : self.weight.shape[1]]
        return (self.weight.double() / scales).round().int()


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774; Frantar et al. 2023, arXiv:2210.17323 (GPTQ)")
@full_float32()
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
    """Prune a layer and round the kept weights, jointly: later columns compensate for pruning and rounding.

    As `sparsegpt`, and a kept weight becomes `q(w) = s * round(w / s)`: the rest of its row changes by
    `-((w - q(w)) / U_jj) U_j,j+1:`. With sparsity 0 it is GPTQ. In the limit of a fine grid it is `sparsegpt`, except
    for weights above the largest code. A kept weight may round to 0: `mask` names the pruned weights.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity, block, damping: as in `sparsegpt`. grid: bits and scales. The result has `codes` and `scale` as well.
    pattern: as in `sparsegpt`.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.prune_and_quantize(weight, x.T @ x, sparsity=0.5, grid=pr.solvers.Grid(bits=4))
        >>> int(solved.mask.sum()), len(solved.weight[0].unique()) <= 15
        (16, True)

    Use: sparse layers of 8 or 4 bits. Avoid: further training, which undoes the rounding.
    """
    checked(weight, gram, pattern, sparsity)
    width = grid.group or weight.shape[1]
    scales: list[Tensor] = []

    def settle(left: Tensor, column: int) -> Tensor:
        if column % width == 0:
            scales.append(grid.scale(left[:, column : column + width]))
        return grid.round(left[:, column : column + 1], scales[-1])[:, 0]

    # A group across blocks would take its scale from columns without the earlier errors.
    size = -(-block // grid.group) * grid.group if grid.group and block > 0 else block
    new_weight, mask, used = by_columns(weight, gram, pattern, sparsity, size, damping, settle)
    error = relative_error(weight, new_weight, gram)
    return OnGrid(new_weight, mask, error, used, torch.cat(scales, 1), width)
