"""Column by column, with what is lost made up for by the columns to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.solvers.linalg import damped_factor
from prunella.types import Gram, Mask, Saliency, Weight

Settle = Callable[[Tensor, int], Tensor]
"""The weights as they are by now, and the number of a column -> what its weights become if they stay."""


def _as_is(weight: Tensor, column: int) -> Tensor:
    return weight[:, column]


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774", status="stable")
def sparsegpt(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    block: int = 128,
    damping: float = 0.01,
) -> Solved:
    """Prune a layer column by column and let the columns to come make up for each weight that goes.

    With `U` the upper Cholesky factor of `(H + damping * mean(diag(H)) I)^-1`, a weight of column j costs
    `w_j^2 / U_jj^2` given the columns before it, and the rest of its row changes by `-(w_j / U_jj) U_j,j+1:`. Masks are
    chosen once for each block of columns, from the weights as they are by then; a `Block` costs what its weights do.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: in [0, 1), not used by `NM`; exactly `round(s * N)` weights go, none more for ties, and as few blocks as
    reach it. block: columns that choose together, at least 1; a multiple of what the pattern spans is taken. damping:
    from 0 up, relative to the mean diagonal; it grows while the matrix is singular, and the result says so.

    Use: large layers when time matters. Avoid: the best accuracy: `admm` has less error for a few times the work.
    """
    checked(weight, gram, pattern, sparsity)
    found, mask, used = by_columns(weight, gram, pattern, sparsity, block, damping)
    return Solved(found, mask, relative_error(weight, found, gram), used)


def by_columns(
    weight: Weight, gram: Gram, pattern: Pattern, sparsity: float, block: int, damping: float, settle: Settle = _as_is
) -> tuple[Tensor, Mask, float]:
    """Weights, mask and the damping it took; `settle` says what becomes of the weights of a column that stay."""
    if block < 1:
        raise RequestError(f"block={block} has no columns", "at least one is needed", "128 is usual")
    factor, used = damped_factor(gram.double(), damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    left = weight.double().clone()
    mask = torch.ones_like(left, dtype=torch.bool)
    pivots = torch.where(gram.diagonal() > 0, upper.diagonal(), torch.inf)  # what multiplies only zeros goes first
    for start, stop in _spans(left.shape[1], block, pattern):
        _columns(left, mask, upper, pivots, slice(start, stop), pattern, sparsity, settle)
    return (left * mask).to(weight.dtype), mask, used


def _spans(columns: int, block: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    span = pattern.m if isinstance(pattern, NM) else pattern.cols if isinstance(pattern, Block) else 1
    size = -(-block // span) * span
    return ((start, min(start + size, columns)) for start in range(0, columns, size))


def _columns(
    left: Tensor,
    mask: Mask,
    upper: Tensor,
    pivots: Tensor,
    span: slice,
    pattern: Pattern,
    sparsity: float,
    settle: Settle,
) -> None:
    """Prune the columns of `span`, then pass their errors on to all columns after them."""
    part, corner, own = left[:, span], upper[span, span], pivots[span]
    errors = torch.zeros_like(part)
    if not isinstance(pattern, NM):
        mask[:, span] = _chosen((part / own).square(), mask[:, : span.start], pattern, sparsity)
    for column in range(part.shape[1]):
        if isinstance(pattern, NM) and column % pattern.m == 0:
            ahead = slice(column, column + pattern.m)
            mask[:, span][:, ahead] = pattern.mask((part[:, ahead] / own[ahead]).square())
        kept = settle(left, span.start + column) * mask[:, span.start + column]
        errors[:, column] = (part[:, column] - kept) / corner[column, column]
        part[:, column:] -= errors[:, column : column + 1] * corner[column, column:]
        part[:, column] = kept
    left[:, span.stop :] -= errors @ upper[span, span.stop :]


def _chosen(costs: Saliency, before: Mask, pattern: Pattern, sparsity: float) -> Mask:
    """What stays of some columns, such that they and those before them have lost their share."""
    rows, width = costs.shape
    each = 1 if isinstance(pattern, Element) and pattern.per_row else rows
    goal, gone = round(sparsity * each * (before.shape[1] + width)), int((~before[:each]).sum())
    return project(costs, pattern, max(0, goal - gone) / (each * width))
