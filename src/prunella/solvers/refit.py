"""The best weights for a given mask."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.model.device import full_float32
from prunella.registry.method import solver
from prunella.solvers.layer import Solved, relative_error
from prunella.solvers.linalg import damped_factor
from prunella.types import Gram, Mask, Weight


@solver(source="Meng et al. 2024, arXiv:2406.07831 (conjugate gradients on the support)")
@full_float32()
def refit(
    weight: Weight, gram: Gram, mask: Mask, *, start: Tensor | None = None, steps: int = 20, damping: float = 0.01
) -> Solved:
    """Least squares on a fixed mask: the weights with the smallest change of the layer's outputs.

    `min over V, V = mask * V of tr((V - W)(H + damping * mean(diag(H)) I)(V - W)^T)`, by conjugate gradients on all
    rows at once, preconditioned by the diagonal: two matrix products per step. The error never grows.
    weight, mask `(out, in)`, gram `(in, in)`. Data: the Gram matrix of the layer's inputs.

    start: initial weights, by default `mask * W`. steps: at least 1; 10 to 20 reach most of the gain. damping: from 0
    up, relative to the mean diagonal; the result reports the damping used.
    Errors: RequestError for shapes or numbers that do not fit.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> mask = weight.abs() > 0.5
        >>> solved = pr.solvers.refit(weight, x.T @ x, mask)
        >>> torch.equal(solved.mask, mask)
        True

    Use: after any mask, of any source. Avoid: few tokens with little damping, where it fits noise.
    """
    if mask.shape != weight.shape:
        raise RequestError(
            f"the mask has shape {tuple(mask.shape)}", f"the weight has {tuple(weight.shape)}", "pass a mask (out, in)"
        )
    if steps < 1:
        raise RequestError(f"steps={steps} is out of range", "at least one step is needed", "use steps=20")
    _, used = damped_factor(gram.double(), damping)
    damped = _damped(gram, used)
    goal = weight.double()
    solution = (goal if start is None else start.double()) * mask
    scale = damped.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    residual = (goal - solution) @ damped * mask
    preconditioned = residual / scale
    direction, energy = preconditioned.clone(), (residual * preconditioned).sum(1)
    min_energy = energy.clone() * 1e-24
    for _ in range(steps):
        image = direction @ damped * mask
        curvature = (direction * image).sum(1)
        step = torch.where((curvature > 0) & (energy > min_energy), energy / curvature.clamp_min(1e-300), 0.0)
        solution = solution + step[:, None] * direction
        residual = residual - step[:, None] * image
        preconditioned = residual / scale
        new_energy = (residual * preconditioned).sum(1)
        ratio = torch.where(energy > min_energy, new_energy / energy.clamp_min(1e-300), 0.0)
        direction, energy = preconditioned + ratio[:, None] * direction, new_energy
    result = solution.to(weight.dtype)
    return Solved(result, mask, relative_error(weight, result, gram), used)


def exact(weight: Weight, gram: Gram, mask: Mask, *, damping: float = 0.01) -> Tensor:
    """The minimum that `refit` approaches, row by row: `V_S = W_S + H_SS^-1 H_SR W_R`, R the pruned columns.

    One factorization per row, `O(out * in^3)`: for small layers, and as the oracle of the others.
    """
    _, used = damped_factor(gram.double(), damping)
    damped, goal = _damped(gram, used), weight.double()
    solution = torch.zeros_like(goal)
    for row, kept in enumerate(mask):
        if bool(kept.any()):
            inner = damped[kept][:, kept]
            solution[row, kept] = torch.linalg.solve(inner, damped[kept] @ goal[row])
    return solution


def _damped(gram: Gram, damping: float) -> Tensor:
    scale = float(gram.diagonal().double().mean())
    return gram.double() + damping * scale * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
