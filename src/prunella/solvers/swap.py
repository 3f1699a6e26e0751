"""A better mask for unchanged weights, one exchange per row at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.types import Gram, Mask, Weight

MIN_GAIN = 1e-9
"""Smallest gain of an exchange, relative to the energy of the row."""


@solver(source="Zhang et al. 2024, arXiv:2310.08915 (DSnoT); here by the exact change of the layer's error")
def swap(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    start: Mask | None = None,
    steps: int = 50,
) -> Solved:
    """Exchange a pruned weight for a kept one, in every row, as long as the error of the layer falls.

    With `d` the pruned part of a row, the return of i and the removal of j change `d H d^T` by
    `w_i^2 H_ii - 2 w_i (d H)_i + w_j^2 H_jj + 2 w_j (d H)_j - 2 w_i w_j H_ij`. In each step every row takes the i with
    the largest gain alone, then the best j for this i, if both together reduce the error; with `NM` the best pair
    within one group. With `Block` the exchange is between blocks of a row of blocks, by the same sum over their rows
    with blocks of `H`. Weights keep their values and rows (and groups) their counts, and the error never grows. DSnoT
    estimates the same changes from means and variances of the inputs.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: of the initial mask, in [0, 1), not used by `NM`. start: the initial mask, by default that of `wanda`.
    steps: largest number of exchanges per row, from 1. Errors: RequestError for a start that splits blocks.
    pattern: of the mask.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.swap(weight, x.T @ x, pr.Element(per_row=True), sparsity=0.5)
        >>> solved.mask.sum(1).tolist(), torch.equal(solved.weight, weight * solved.mask)
        ([4, 4, 4, 4], True)

    Use: before `refit`, or for weights that must not change. Avoid: cases where weights may change: `admm` has far less
    error.
    """
    checked(weight, gram, pattern, sparsity)
    if steps < 1 or (start is not None and start.shape != weight.shape):
        why = "steps is at least 1, and a mask has the shape (out, in) of the weight"
        raise RequestError(f"swap cannot use steps={steps} or this mask", why, "use steps=50")
    scores = weight.double().abs() * gram.double().diagonal().clamp_min(0).sqrt()
    mask = project(scores, pattern, sparsity) if start is None else start
    rows, cols = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    tiles, inputs = _tiles(weight.double(), rows, cols), _striped(gram.double(), cols)
    kept = _kept_blocks(mask, pattern, rows, cols)
    energy = torch.einsum("irja,jab,irjb->ij", tiles, _corners(inputs), tiles)
    min_gain = MIN_GAIN * (_gram_product(tiles, inputs) * tiles).sum((1, 2, 3))
    products = _gram_product(tiles * ~kept[:, None, :, None], inputs)
    for _ in range(steps):
        restored, removed, change = _best_exchange(tiles, inputs, products, energy, kept, pattern)
        changed = (change < -min_gain).nonzero()[:, 0]
        if not len(changed):
            break
        restored, removed = restored[changed], removed[changed]
        kept[changed, restored], kept[changed, removed] = True, False
        gone, back = tiles[changed, :, removed] @ inputs[removed], tiles[changed, :, restored] @ inputs[restored]
        products[changed] += (gone - back).view_as(products[changed])
    mask = _expanded(kept, pattern, mask)
    return Solved(weight * mask, mask, relative_error(weight, weight * mask, gram))


def _best_exchange(
    tiles: Tensor, inputs: Tensor, products: Tensor, energy: Tensor, kept: Mask, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row what is restored, what is removed, and the change of the error."""
    cross = 2 * (tiles * products).sum((1, 3))
    restore, remove = (energy - cross).masked_fill(kept, torch.inf), (energy + cross).masked_fill(~kept, torch.inf)
    if isinstance(pattern, NM):
        return _in_groups(tiles[:, 0, :, 0], inputs[:, 0], restore, remove, pattern)
    return _in_rows(tiles, inputs, restore, remove)


def _kept_blocks(mask: Mask, pattern: Pattern, rows: int, cols: int) -> Mask:
    """`(rows of blocks, columns of blocks)`. Errors: RequestError for a mask that splits blocks."""
    kept: Mask = _tiles(mask, rows, cols).any(3).any(1)
    if not torch.equal(_expanded(kept, pattern, mask), mask):
        raise RequestError("the initial mask splits blocks", f"the pattern is {pattern}", "pass a mask of this pattern")
    return kept


def _tiles(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """`(rows of blocks, rows, columns of blocks, cols)`, padded with zeros."""
    out, width = matrix.shape
    padded = pad(matrix, (0, -width % cols, 0, -out % rows))
    return padded.view(-1, rows, padded.shape[1] // cols, cols)


def _striped(gram: Gram, cols: int) -> Tensor:
    """`(columns of blocks, cols, in)`."""
    fill = -len(gram) % cols
    padded = pad(gram, (0, fill, 0, fill))
    return padded.view(-1, cols, len(padded))


def _corners(inputs: Tensor) -> Tensor:
    """The blocks of the Gram matrix on its diagonal, `(columns of blocks, cols, cols)`."""
    cols = inputs.shape[1]
    return torch.stack([stripe[:, k * cols : (k + 1) * cols] for k, stripe in enumerate(inputs)])


def _gram_product(tiles: Tensor, inputs: Tensor) -> Tensor:
    """The product with the Gram matrix."""
    return (tiles.flatten(2) @ inputs.flatten(0, 1)).view_as(tiles)


def _expanded(kept: Tensor, pattern: Pattern, mask: Mask) -> Mask:
    """The kept blocks as a mask in the shape of `mask`."""
    if not isinstance(pattern, Block):
        return kept.clone()
    full = kept.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    return full[: mask.shape[0], : mask.shape[1]].contiguous()


def _in_rows(tiles: Tensor, inputs: Tensor, restore: Tensor, remove: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the restored block, the removed block, and the change of the error.

    restore, remove: change of the error by one restored or removed block alone; infinite for blocks already kept or
    pruned.
    """
    gain, restored = restore.min(1)
    restored_tiles = tiles[torch.arange(len(tiles), device=tiles.device), :, restored]
    both = (tiles * (restored_tiles @ inputs[restored]).view_as(tiles)).sum((1, 3))
    cost, removed = (remove - 2 * both).min(1)
    return restored, removed, gain + cost


def _in_groups(
    weight: Tensor, gram: Gram, restore: Tensor, remove: Tensor, pattern: NM
) -> tuple[Tensor, Tensor, Tensor]:
    """`_in_rows` for the best pair within all groups of M columns."""
    m, (out, width) = pattern.m, weight.shape
    fill = -width % m
    restore, remove = (pad(part, (0, fill), value=torch.inf).view(out, -1, m) for part in (restore, remove))
    groups = pad(weight, (0, fill)).view(out, -1, m)
    squares = pad(gram, (0, fill, 0, fill)).view(groups.shape[1], m, -1, m)
    group_grams = torch.stack([squares[k, :, k] for k in range(groups.shape[1])])
    both = restore.unsqueeze(-1) + remove.unsqueeze(-2) - 2 * groups.unsqueeze(-1) * groups.unsqueeze(-2) * group_grams
    change, place = both.flatten(1).min(1)
    group, pair = place // (m * m), place % (m * m)
    return group * m + pair // m, group * m + pair % m, change
