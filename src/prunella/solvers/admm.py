"""Mask and weights of one layer by alternating directions."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.model.device import full_float32
from prunella.registry.method import solver
from prunella.schedules import cubic
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.solvers.linalg import damped_factor, for_each_gram, or_identity
from prunella.types import Gram, Mask, Saliency, Weight

SAMPLE = 1 << 16
"""Number of sampled weights for the threshold while the sparsity grows."""


@solver(source="Boza 2024, arXiv:2401.02938; Meng et al. 2024, arXiv:2406.07831 (ALPS)", status="stable")
@full_float32()
def admm(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    steps: int = 20,
    damping: float = 0.01,
) -> Solved:
    """Alternate between the best weights near a mask and the best mask near the weights, pruning gradually.

    With inputs scaled to unit norm (`A` the damped Gram matrix of them, `W` the weights times the norms):
    `V = (W A + Z - U)(A + I)^-1`, `Z = P(V + U)`, `U = U + V - Z`, where `P` keeps the largest entries of the pattern.
    In the first three quarters of the steps the sparsity grows along `cubic`. Then the mask is fixed, and the weights
    converge to least squares on this mask. One inverse, then two matrix products per step.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: in [0, 1), not used by `NM`. steps: at least 4; 20 is close to the end. damping: from 0 up, relative to
    the mean diagonal; it grows while the matrix is singular, and the result reports it.
    Errors: RequestError for shapes, a pattern or numbers that do not fit.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.admm(weight, x.T @ x, sparsity=0.5)
        >>> int(solved.mask.sum()), bool((solved.weight[~solved.mask] == 0).all())
        (16, True)

    Use: the best layer error for its time, for any pattern, N:M above all. Avoid: very wide layers in little memory.
    """
    checked(weight, gram, pattern, sparsity)
    if steps < 4:
        raise RequestError(
            f"steps={steps} is too few",
            "the first steps raise the sparsity, the last ones fit the weights",
            "use steps=20",
        )
    scaled, inverse, norms, used = _scaled(gram, damping)
    undamped, gram = gram, or_identity(gram)
    # Factors in float64. Steps in float32 unless the weights are finer: A + I has no eigenvalue below 1.
    working = torch.promote_types(weight.dtype, torch.float32)
    inverse, norms = inverse.to(working), norms.to(working)
    goal = weight.to(working) * norms
    target, active_inputs = goal @ scaled.to(working), gram.diagonal() > 0
    primal, dual, growth_steps = goal, torch.zeros_like(goal), max(1, 3 * steps // 4)
    mask = torch.ones_like(goal, dtype=torch.bool)
    for step in range(1, steps + 1):
        if step <= growth_steps:
            mask = _schedule_mask((primal + dual) * active_inputs, pattern, sparsity, cubic(step / growth_steps))
        sparse = (primal + dual) * mask
        dual = dual + primal - sparse
        primal = (target + sparse - dual) @ inverse
    new_weight = ((primal + dual) * mask / norms).to(weight.dtype)
    return Solved(new_weight, mask, relative_error(weight, new_weight, undamped), used)


@for_each_gram
def _scaled(gram: Gram, damping: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """The damped matrix A for inputs of unit norm, the inverse of A + I, these norms, and the damping used."""
    gram = or_identity(gram).double()
    _, used = damped_factor(gram, damping)
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    damped = gram + used * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny) * eye
    norms = damped.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    scaled = damped / torch.outer(norms, norms)
    return scaled, torch.cholesky_inverse(torch.linalg.cholesky(scaled + eye)), norms, used


def _schedule_mask(values: Tensor, pattern: Pattern, sparsity: float, part: float) -> Mask:
    """The mask at the fraction `part` of the schedule. For N:M, this fraction of the weights outside the final pattern.

    Before the end the count is approximate: the order of removal is a guess, and an exact threshold costs as much as a
    product with the inverse.
    """
    size = values.abs()
    if part == 1 or isinstance(pattern, Block) or (isinstance(pattern, Element) and pattern.per_row):
        return project(size, pattern, part * sparsity)
    if isinstance(pattern, NM):
        return _threshold_mask(size.masked_fill(pattern.mask(size), torch.inf), part)
    return _threshold_mask(size, part * sparsity)


def _threshold_mask(scores: Saliency, share: float) -> Mask:
    """Remove about the fraction `share` of the finite scores, the lowest ones. Every n-th score decides the threshold.

    n is odd, so that all columns contribute.
    """
    sample = scores.flatten()[:: (scores.numel() // SAMPLE) | 1]
    count = round(share * int(sample.isfinite().sum()))
    return scores > sample.kthvalue(count).values if count else torch.ones_like(scores, dtype=torch.bool)
