"""Optimal brain surgeon: updates of the kept weights for the pruned ones, given the inverse of a curvature matrix.

All functions treat one quadratic `1/2 d^T H d` around weights `w`, or a batch of them: `inverse` is `H^-1`,
`(..., n, n)`, `weight` and `pruned` are `(..., n)`. Every pruned weight becomes zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunella.types import Mask


class Cut(NamedTuple):
    """New weights, exactly zero where pruned, and the cost by the quadratic."""

    weight: Tensor
    loss: Tensor


def saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """Cost of the removal of each single weight with compensation by the others: `w_q^2 / (2 [H^-1]_qq)`."""
    return weight.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))


def cut(weight: Tensor, inverse: Tensor, pruned: Mask) -> Cut:
    """Remove all of `pruned`, the set S: `d = -H^-1[:, S] u` with `u = ([H^-1]_SS)^-1 w_S`, at a cost of `1/2 w_S u`.

    The sets of a batch may differ in size: kept weights have the identity in the linear system.
    """
    both = pruned.unsqueeze(-1) & pruned.unsqueeze(-2)
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    lost = (weight * pruned).unsqueeze(-1)
    u = torch.linalg.solve(torch.where(both, inverse, eye), lost)
    updated = (weight.unsqueeze(-1) - inverse @ u).squeeze(-1)
    return Cut(updated.masked_fill(pruned, 0), (lost * u).sum((-2, -1)) / 2)


def cut_one_by_one(weight: Tensor, inverse: Tensor, pruned: Mask) -> Cut:
    """`cut` for one quadratic, one weight at a time, the cheapest first.

    `d = -(w_q / [H^-1]_qq) h_q`, then the inverse loses q: `H^-1 -= h_q h_q^T / [H^-1]_qq`. The result does not depend
    on the order.
    """
    inverse_left, values, remaining = inverse.clone(), weight.clone(), pruned.clone()
    loss = torch.zeros((), dtype=weight.dtype, device=weight.device)
    while bool(remaining.any()):
        cost = torch.where(remaining, values.square() / inverse_left.diagonal().clamp_min(1e-300), torch.inf)
        q = int(cost.argmin())
        column, pivot = inverse_left[:, q].clone(), inverse_left[q, q].clone()
        loss = loss + values[q].square() / (2 * pivot)
        values = values - values[q] / pivot * column
        inverse_left = inverse_left - torch.outer(column, column) / pivot
        inverse_left[q], inverse_left[:, q] = 0, 0
        inverse_left[q, q] = 1
        values[q] = 0
        remaining[q] = False
    return Cut(values.masked_fill(pruned, 0), loss)


def inverse_fisher(grads: Tensor, damping: float) -> Tensor:
    """`(damping * I + mean_n g_n g_n^T)^-1`, one gradient after another; grads `(samples, ..., n)`.

    `F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)` from `F_0^-1 = I / damping`.
    """
    size = grads.shape[-1]
    eye = torch.eye(size, dtype=grads.dtype, device=grads.device) / damping
    inverse = eye.expand(*grads.shape[1:], size).clone()
    for g in grads:
        product = inverse @ g.unsqueeze(-1)
        scale = len(grads) + (g.unsqueeze(-1) * product).sum((-2, -1), keepdim=True)
        inverse -= product @ product.transpose(-1, -2) / scale
    return inverse


def inverse_product(grads: Tensor, vector: Tensor, damping: float) -> Tensor:
    """`(damping * I + G^T G / N)^-1 v` from the rows of `G` `(samples, n)` alone, without a matrix of n x n.

    `(v - G^T (N damping I + G G^T)^-1 G v) / damping`: a system of N unknowns. `v` is `(n,)` or `(n, many)`.
    """
    return (vector - grads.T @ _in_samples(grads, damping, grads @ vector)) / damping


def cut_matrix_free(weight: Tensor, grads: Tensor, pruned: Mask, damping: float) -> Cut:
    """`cut` with the inverse of `inverse_product`, for a full layer: weight, pruned `(n,)`, grads `(samples, n)`.

    The kept weights change by `G_K^T (N damping I + G_K G_K^T)^-1 G_S w_S`, K the kept and S the pruned weights: the
    minimum of the quadratic over the kept weights.
    """
    lost, kept_grads = weight * pruned, grads * ~pruned
    effect = grads @ lost
    coefficients = _in_samples(kept_grads, damping, effect)
    # the gradients' part of the quadratic is |G d|^2 / N, the damping's |d|^2
    change = kept_grads.T @ coefficients - lost
    loss = ((grads @ change).square().sum() / len(grads) + damping * change.square().sum()) / 2
    return Cut((weight + change).masked_fill(pruned, 0), loss)


def cut_singly(weight: Tensor, inverse: Tensor, pruned: Mask) -> Tensor:
    """New weights by the sum of the updates for each pruned weight alone: `d = -sum_p w_p / [H^-1]_pp H^-1 e_p`.

    It ignores that pruned weights depend on each other, and so moves less than `cut` along noise.
    """
    single = weight * pruned / inverse.diagonal(dim1=-2, dim2=-1)
    return (weight - (inverse @ single.unsqueeze(-1)).squeeze(-1)).masked_fill(pruned, 0)


def cut_singly_matrix_free(weight: Tensor, grads: Tensor, pruned: Mask, damping: float) -> Tensor:
    """`cut_singly` with the inverse of `inverse_product`: weight, pruned `(n,)`, grads `(samples, n)`.

    `[H^-1]_pp = (1 - |L^-1 g_p|^2) / damping` with `L L^T = N damping I + G G^T` and column p of G.
    """
    half = torch.linalg.solve_triangular(_factor(grads, damping), grads, upper=False)
    diagonal = (1 - half.square().sum(0)).clamp_min(torch.finfo(weight.dtype).eps) / damping
    single = weight * pruned / diagonal
    return (weight - inverse_product(grads, single, damping)).masked_fill(pruned, 0)


def _in_samples(grads: Tensor, damping: float, right: Tensor) -> Tensor:
    """`(N damping I + G G^T)^-1 r`, for r with N rows."""
    columns = right if right.dim() > 1 else right.unsqueeze(-1)
    solved: Tensor = torch.cholesky_solve(columns, _factor(grads, damping))
    return solved if right.dim() > 1 else solved.squeeze(-1)


def _factor(grads: Tensor, damping: float) -> Tensor:
    kernel = grads @ grads.T
    kernel.diagonal().add_(len(grads) * damping)
    factor: Tensor = torch.linalg.cholesky(kernel)
    return factor
