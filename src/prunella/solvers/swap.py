"""A better mask for weights that stay as they are, one exchange in a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.types import Gram, Mask, Weight

LEAST = 1e-9
"""Part of a row's energy that an exchange must save."""


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
    """Exchange a weight that is gone for one that stays, in every row, as long as the layer's error falls.

    With `d` the part of a row that is gone, bringing i back and taking j away changes `d H d^T` by
    `w_i^2 H_ii - 2 w_i (d H)_i + w_j^2 H_jj + 2 w_j (d H)_j - 2 w_i w_j H_ij`. In each step every row takes the i that
    saves most alone, then the best j for it, if both together save; with `NM` the best pair within one of its groups.
    With `Block` whole blocks of a row of blocks are exchanged, by the same sum over their rows with blocks of `H`.
    Weights keep their values, so rows (and groups) keep their counts and the error never grows. DSnoT estimates the
    same changes from means and variances of the inputs.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: of the mask that it starts from, in [0, 1), not used by `NM`. start: that mask, by default the one of
    `wanda`. steps: most exchanges in a row, from 1. Errors: RequestError for a start that splits blocks.

    Use: before `refit`, or where weights must not change. Avoid: instead of new weights: `admm` has far less error.
    """
    checked(weight, gram, pattern, sparsity)
    if steps < 1 or (start is not None and start.shape != weight.shape):
        raise RequestError(f"swap cannot use steps={steps}, or the mask does not fit", "", "steps=50, a mask (out, in)")
    rows, cols = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    wide, inputs = _tiles(weight.double(), rows, cols), _striped(gram.double(), cols)
    first = weight.double().abs() * gram.double().diagonal().clamp_min(0).sqrt()
    mask = project(first, pattern, sparsity) if start is None else start
    stays = _tiles(mask, rows, cols).any(3).any(1)
    if not torch.equal(_whole(stays, pattern, mask), mask):
        raise RequestError("the mask to start from is not made of whole blocks", f"the pattern is {pattern}", "")
    energy = torch.einsum("irja,jab,irjb->ij", wide, _corners(inputs), wide)
    enough = LEAST * (_through(wide, inputs) * wide).sum((1, 2, 3))
    pull = _through(wide * ~stays[:, None, :, None], inputs)
    for _ in range(steps):
        cross = 2 * (wide * pull).sum((1, 3))
        grow, drop = (energy - cross).masked_fill(stays, torch.inf), (energy + cross).masked_fill(~stays, torch.inf)
        back, away, change = (
            _in_groups(wide[:, 0, :, 0], inputs[:, 0], grow, drop, pattern)
            if isinstance(pattern, NM)
            else _in_rows(wide, inputs, grow, drop)
        )
        who = (change < -enough).nonzero()[:, 0]
        if not len(who):
            break
        back, away = back[who], away[who]
        stays[who, back], stays[who, away] = True, False
        pull[who] += (wide[who, :, away] @ inputs[away] - wide[who, :, back] @ inputs[back]).view_as(pull[who])
    mask = _whole(stays, pattern, mask)
    found = weight * mask
    return Solved(found, mask, relative_error(weight, found, gram))


def _tiles(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """`(rows of blocks, rows, columns of blocks, cols)`, filled up with zeros."""
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


def _through(tiles: Tensor, inputs: Tensor) -> Tensor:
    """Times the Gram matrix."""
    return (tiles.flatten(2) @ inputs.flatten(0, 1)).view_as(tiles)


def _whole(stays: Tensor, pattern: Pattern, mask: Mask) -> Mask:
    """A mask like `mask` from which blocks stay."""
    if not isinstance(pattern, Block):
        return stays.clone()
    full = stays.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    return full[: mask.shape[0], : mask.shape[1]].contiguous()


def _in_rows(wide: Tensor, inputs: Tensor, grow: Tensor, drop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the one to come back, the one to go, and the change of the error.

    grow, drop: change of the error when one comes back, or goes, alone; infinite where it is there, or gone, already.
    """
    gain, back = grow.min(1)
    own = wide[torch.arange(len(wide), device=wide.device), :, back]
    both = (wide * (own @ inputs[back]).view_as(wide)).sum((1, 3))
    cost, away = (drop - 2 * both).min(1)
    return back, away, gain + cost


def _in_groups(weight: Tensor, gram: Gram, grow: Tensor, drop: Tensor, pattern: NM) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the best pair of all groups of M columns."""
    m, (out, width) = pattern.m, weight.shape
    fill = -width % m
    grow, drop = (pad(part, (0, fill), value=torch.inf).view(out, -1, m) for part in (grow, drop))
    groups = pad(weight, (0, fill)).view(out, -1, m)
    squares = pad(gram, (0, fill, 0, fill)).view(groups.shape[1], m, -1, m)
    near = torch.stack([squares[k, :, k] for k in range(groups.shape[1])])
    both = grow.unsqueeze(-1) + drop.unsqueeze(-2) - 2 * groups.unsqueeze(-1) * groups.unsqueeze(-2) * near
    change, place = both.flatten(1).min(1)
    group, pair = place // (m * m), place % (m * m)
    return group * m + pair // m, group * m + pair % m, change
