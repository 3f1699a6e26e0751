"""A better mask for weights that stay as they are, one exchange in a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.method import solver
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
    Weights keep their values, so rows (and groups) keep their counts and the error never grows. DSnoT estimates the
    same changes from means and variances of the inputs.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: of the mask that it starts from, in [0, 1), not used by `NM`. start: that mask, by default the one of
    `wanda`. steps: most exchanges in a row, from 1. Errors: RequestError for `Block`, which spans rows.

    Use: before `refit`, or where weights must not change. Avoid: instead of new weights: `admm` has far less error.
    """
    checked(weight, gram, pattern, sparsity)
    if isinstance(pattern, Block):
        raise RequestError("swap exchanges single weights or those of an N:M group", "blocks span rows", "use admm")
    if steps < 1 or (start is not None and start.shape != weight.shape):
        raise RequestError(f"swap cannot use steps={steps}, or the mask does not fit", "", "steps=50, a mask (out, in)")
    wide, inputs = weight.double(), gram.double()
    first = wide.abs() * inputs.diagonal().clamp_min(0).sqrt()
    mask = project(first, pattern, sparsity) if start is None else start.clone()
    enough = LEAST * ((wide @ inputs) * wide).sum(1)
    pull = (wide * ~mask) @ inputs
    rows = torch.arange(len(wide), device=wide.device)
    for _ in range(steps):
        back, away, change = (
            _in_groups(wide, inputs, mask, pull, pattern)
            if isinstance(pattern, NM)
            else _in_rows(wide, inputs, mask, pull)
        )
        better = change < -enough[rows]
        if not bool(better.any()):
            break
        who, back, away = rows[better], back[better], away[better]
        mask[who, back], mask[who, away] = True, False
        pull[who] += wide[who, away, None] * inputs[away] - wide[who, back, None] * inputs[back]
    found = weight * mask
    return Solved(found, mask, relative_error(weight, found, gram))


def _alone(weight: Tensor, gram: Gram, mask: Mask, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Change of the error when a weight comes back, or goes, alone; infinite where it is there, or gone, already."""
    energy, cross = weight.square() * gram.diagonal(), 2 * weight * pull
    return (energy - cross).masked_fill(mask, torch.inf), (energy + cross).masked_fill(~mask, torch.inf)


def _in_rows(weight: Tensor, gram: Gram, mask: Mask, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the one to come back, the one to go, and the change of the error."""
    grow, drop = _alone(weight, gram, mask, pull)
    gain, back = grow.min(1)
    own = weight.gather(1, back[:, None])
    cost, away = (drop - 2 * own * weight * gram[back]).min(1)
    return back, away, gain + cost


def _in_groups(weight: Tensor, gram: Gram, mask: Mask, pull: Tensor, pattern: NM) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the best pair of all groups of M columns."""
    m, (out, width) = pattern.m, weight.shape
    fill = -width % m
    grow, drop = (pad(part, (0, fill), value=torch.inf).view(out, -1, m) for part in _alone(weight, gram, mask, pull))
    groups = pad(weight, (0, fill)).view(out, -1, m)
    squares = pad(gram, (0, fill, 0, fill)).view(groups.shape[1], m, -1, m)
    near = torch.stack([squares[k, :, k] for k in range(groups.shape[1])])
    both = grow.unsqueeze(-1) + drop.unsqueeze(-2) - 2 * groups.unsqueeze(-1) * groups.unsqueeze(-2) * near
    change, place = both.flatten(1).min(1)
    group, pair = place // (m * m), place % (m * m)
    return group * m + pair // m, group * m + pair % m, change
