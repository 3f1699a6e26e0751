"""Alternating directions in the eigenbasis of the inputs, with a penalty that grows until the mask is stable."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.model.device import full_float32
from prunella.registry.method import solver
from prunella.solvers.layer import Pattern, Solved, checked, project, relative_error
from prunella.solvers.linalg import damped_factor, for_each_gram, or_identity
from prunella.solvers.refit import refit
from prunella.types import Gram, Mask, Weight

EVERY = 3
"""Steps between two updates of the penalty."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(fraction, factor): the penalty grows by `factor` if more than `fraction` of the kept weights changed."""


@solver(source="Meng et al. 2024, arXiv:2406.07831 (ALPS)", status="stable")
@full_float32()
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
    projection on the pattern. Every third step rho, 0.1 at first, grows by 1.1 to 1.3, faster for larger changes of the
    mask. When the mask is stable, conjugate gradients solve for the weights on it. One eigendecomposition, so that a
    new rho is free; four matrix products per step.
    weight `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    sparsity: in [0, 1), not used by `NM`. steps: upper limit, from 1; 30 to 100 are usual. damping: from 0 up,
    relative to the mean diagonal; it grows while the matrix is singular, and the result reports it.
    Errors: RequestError for shapes, a pattern or numbers that do not fit.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.alps(weight, x.T @ x, sparsity=0.5)
        >>> int(solved.mask.sum()), bool((solved.weight[~solved.mask] == 0).all())
        (16, True)

    Use: the last percent of error, N:M above all. Avoid: little time: `admm` has most of the gain in a fifth of the
    time.
    """
    checked(weight, gram, pattern, sparsity)
    if steps < 1:
        raise RequestError(f"steps={steps} is out of range", "at least one step is needed", "use steps=300")
    spectrum = _spectrum(gram, damping)
    undamped, gram, norms, used = gram, or_identity(gram), spectrum.norms, spectrum.damping
    goal, active_inputs = weight.double() * norms, gram.diagonal() > 0
    solution, mask = _alternate(goal, spectrum, active_inputs, pattern, sparsity, steps)
    result = refit(weight, gram, mask, start=solution / norms, damping=used)
    return result if undamped is gram else replace(result, error=relative_error(weight, result.weight, undamped))


class _Spectrum(NamedTuple):
    """A damped Gram matrix for inputs of unit norm, its eigenvalues and eigenvectors, these norms, and the damping."""

    scaled: Gram
    energy: Tensor
    basis: Tensor
    norms: Tensor
    damping: float


@for_each_gram
def _spectrum(gram: Gram, damping: float) -> _Spectrum:
    damped = or_identity(gram).double().clone()
    _, used = damped_factor(damped, damping)
    damped.diagonal().add_(used * damped.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    norms = damped.diagonal().sqrt()
    scaled = damped / torch.outer(norms, norms)
    energy, basis = torch.linalg.eigh(scaled)
    return _Spectrum(scaled, energy, basis, norms, used)


def _alternate(
    goal: Tensor, spectrum: _Spectrum, active_inputs: Tensor, pattern: Pattern, sparsity: float, steps: int
) -> tuple[Tensor, Mask]:
    """Weights and mask for inputs of unit norm. Weights of inactive inputs (always zero) are removed first."""
    scaled, energy, basis = spectrum.scaled, spectrum.energy, spectrum.basis
    target, rho = goal @ scaled, 0.1
    mask = project(goal.abs() * active_inputs, pattern, sparsity)
    sparse, dual, previous = goal * mask, torch.zeros_like(goal), mask
    for step in range(1, steps + 1):
        primal = (target + rho * sparse - dual) @ basis / (energy + rho) @ basis.T
        proposal = primal + dual / rho
        mask = project(proposal.abs() * active_inputs, pattern, sparsity)
        sparse = proposal * mask
        dual = dual + rho * (primal - sparse)
        if step % EVERY == 0:
            change = int((mask & ~previous).sum()) / max(1, int(mask.sum()))
            if not change:
                break
            rho *= next(factor for part, factor in GROWTH if change > part)
            previous = mask
    return sparse, mask
