"""Pruning column by column, with compensation by later columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.model.device import full_float32
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.solvers.linalg import damped_factor, for_each_gram, or_identity
from prunella.types import Gram, Mask, Saliency, Weight

Settle = Callable[[Tensor, int], Tensor]
"""(current weights, number of a column) -> the values of the kept weights of this column."""


def _as_is(weight: Tensor, column: int) -> Tensor:
    return weight[:, column]


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774", status="stable")
@full_float32()
def sparsegpt(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    block: int = 128,
    damping: float = 0.01,
) -> Solved:
    """Prune a layer column by column; later columns compensate for each pruned weight.

    With `U` the upper Cholesky factor of `(H + damping * mean(diag(H)) I)^-1`, a weight of column j costs
    `w_j^2 / U_jj^2` given the columns before it, and the rest of its row changes by `-(w_j / U_jj) U_j,j+1:`. Each
    block of columns chooses its mask once, from the current weights; the cost of a `Block` is the sum over its weights.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: in [0, 1), not used by `NM`; exactly `round(s * N)` weights are removed, ties included, or the fewest
    blocks that reach it. block: columns of one choice, at least 1, rounded up to a multiple of the pattern. damping:
    from 0 up, relative to the mean diagonal; it grows while the matrix is singular, and the result reports it.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.sparsegpt(weight, x.T @ x, sparsity=0.5)
        >>> int(solved.mask.sum()), bool((solved.weight[~solved.mask] == 0).all())
        (16, True)

    Use: large layers and little time. Avoid: best accuracy: `admm` has less error for a few times the work.
    """
    checked(weight, gram, pattern, sparsity)
    new_weight, mask, used = by_columns(weight, gram, pattern, sparsity, block, damping)
    return Solved(new_weight, mask, relative_error(weight, new_weight, gram), used)


def by_columns(
    weight: Weight, gram: Gram, pattern: Pattern, sparsity: float, block: int, damping: float, settle: Settle = _as_is
) -> tuple[Tensor, Mask, float]:
    """Weights, mask and the damping used; `settle` gives the values of the kept weights of a column."""
    if block < 1:
        raise RequestError(f"block={block} has no columns", "at least one is needed", "use block=128")
    upper, used = _inverse_factor(gram, damping)
    gram = or_identity(gram)
    current = weight.double().clone()
    mask = torch.ones_like(current, dtype=torch.bool)
    pivots = torch.where(gram.diagonal() > 0, upper.diagonal(), torch.inf)  # weights of zero inputs are removed first
    for start, stop in _spans(current.shape[1], block, pattern):
        _columns(current, mask, upper, pivots, slice(start, stop), pattern, sparsity, settle)
    return (current * mask).to(weight.dtype), mask, used


@for_each_gram
def _inverse_factor(gram: Gram, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse, and the damping used."""
    factor, used = damped_factor(or_identity(gram).double(), damping)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True), used


def _spans(columns: int, block: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    span = pattern.m if isinstance(pattern, NM) else pattern.cols if isinstance(pattern, Block) else 1
    size = -(-block // span) * span
    return ((start, min(start + size, columns)) for start in range(0, columns, size))


def _columns(
    current: Tensor,
    mask: Mask,
    upper: Tensor,
    pivots: Tensor,
    span: slice,
    pattern: Pattern,
    sparsity: float,
    settle: Settle,
) -> None:
    """Prune the columns of `span`, then add their errors to all later columns."""
    columns, corner, diagonal = current[:, span], upper[span, span], pivots[span]
    errors = torch.zeros_like(columns)
    if not isinstance(pattern, NM):
        mask[:, span] = _chosen((columns / diagonal).square(), mask[:, : span.start], pattern, sparsity)
    for column in range(columns.shape[1]):
        if isinstance(pattern, NM) and column % pattern.m == 0:
            next_columns = slice(column, column + pattern.m)
            mask[:, span][:, next_columns] = pattern.mask((columns[:, next_columns] / diagonal[next_columns]).square())
        kept = settle(current, span.start + column) * mask[:, span.start + column]
        errors[:, column] = (columns[:, column] - kept) / corner[column, column]
        columns[:, column:] -= errors[:, column : column + 1] * corner[column, column:]
        columns[:, column] = kept
    current[:, span.stop :] -= errors @ upper[span, span.stop :]


def _chosen(costs: Saliency, before: Mask, pattern: Pattern, sparsity: float) -> Mask:
    """The mask of some columns, such that these and all earlier columns together reach the sparsity."""
    rows, width = costs.shape
    each = 1 if isinstance(pattern, Element) and pattern.per_row else rows
    wanted, removed = round(sparsity * each * (before.shape[1] + width)), int((~before[:each]).sum())
    return project(costs, pattern, max(0, wanted - removed) / (each * width))
