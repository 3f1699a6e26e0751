"""Alternating directions in the eigenbasis of the inputs, with a penalty that grows until the mask stands still."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project
from prunella.solvers.linalg import damped_factor
from prunella.solvers.refit import refit
from prunella.types import Gram, Mask, Weight

EVERY = 3
"""Steps between two looks at how much the mask has changed."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The penalty's factor where more than such a part of the kept weights has changed; none has: the end."""


@solver(source="Meng et al. 2024, arXiv:2406.07831 (ALPS)", status="stable")
def alps(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    steps: int = 300,
    damping: float = 0.01,
) -> Solved:
    """Mask and weights with the least error of the layer solvers: `admm` with a growing penalty, then `refit`.

    With inputs scaled to unit norm, `A = Q diag(e) Q^T` the damped Gram matrix of them and `W` the weights times the
    norms: `V = (W A + rho Z - Y) Q diag(1 / (e + rho)) Q^T`, `Z = P(V + Y / rho)`, `Y += rho (V - Z)`, `P` the
    projection on the pattern. Every third step rho, 0.1 at first, grows by 1.1 to 1.3, the faster the more of the mask
    has changed since; when none has, the weights on it are solved by conjugate gradients. One eigendecomposition, so
    that a new rho costs nothing; four matrix products a step.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: in [0, 1), not used by `NM`. steps: at most so many, from 1; 30 to 100 are taken. damping: from 0 up,
    relative to the mean diagonal; it grows while the matrix is singular, and the result says so.

    Use: the last per cent of error, above all N:M. Avoid: when time matters: `admm` has most of the gain in a fifth.
    """
    checked(weight, gram, pattern, sparsity)
    if steps < 1:
        raise RequestError(f"steps={steps} does nothing", "at least one is needed", "300 is usual")
    tiny = torch.finfo(torch.float64).tiny
    _, used = damped_factor(gram.double(), damping)
    damped = gram.double().clone()
    damped.diagonal().add_(used * gram.double().diagonal().mean().clamp_min(tiny))
    norms = damped.diagonal().sqrt()
    goal, heard = weight.double() * norms, gram.diagonal() > 0
    found, mask = _alternate(goal, damped / torch.outer(norms, norms), heard, pattern, sparsity, steps)
    return refit(weight, gram, mask, start=found / norms, damping=used)


def _alternate(
    goal: Tensor, scaled: Gram, heard: Tensor, pattern: Pattern, sparsity: float, steps: int
) -> tuple[Tensor, Mask]:
    """Weights and mask for inputs of unit norm; `heard` is False for inputs that are always zero, which go first."""
    energy, basis = torch.linalg.eigh(scaled)
    pull, rho = goal @ scaled, 0.1
    mask = project(goal.abs() * heard, pattern, sparsity)
    target, dual, seen = goal * mask, torch.zeros_like(goal), mask
    for step in range(1, steps + 1):
        free = (pull + rho * target - dual) @ basis / (energy + rho) @ basis.T
        wish = free + dual / rho
        mask = project(wish.abs() * heard, pattern, sparsity)
        target = wish * mask
        dual = dual + rho * (free - target)
        if step % EVERY == 0:
            changed = int((mask & ~seen).sum()) / max(1, int(mask.sum()))
            if not changed:
                break
            rho *= next(factor for part, factor in GROWTH if changed > part)
            seen = mask
    return target, mask
