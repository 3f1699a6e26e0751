"""Optimal brain surgeon: what the weights that stay do for those that go, given the inverse of a curvature matrix.

Everything here is of one quadratic `1/2 d^T H d` around weights `w`, or of many at once: `inverse` is `H^-1`,
`(..., n, n)`, `weight` and `gone` are `(..., n)`. No weight that goes keeps a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunella.types import Mask


class Cut(NamedTuple):
    """New weights, exactly zero where they are gone, and what the quadratic says that it costs."""

    weight: Tensor
    loss: Tensor


def saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """What each weight costs if it goes alone and the others make up for it: `w_q^2 / (2 [H^-1]_qq)`."""
    return weight.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))


def cut(weight: Tensor, inverse: Tensor, gone: Mask) -> Cut:
    """All that is `gone` at once, the set S: `d = -H^-1[:, S] u` with `u = ([H^-1]_SS)^-1 w_S`; it costs `1/2 w_S u`.

    The sets of a batch may differ in size: what stays is the identity in the system that is solved.
    """
    both = gone.unsqueeze(-1) & gone.unsqueeze(-2)
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    lost = (weight * gone).unsqueeze(-1)
    u = torch.linalg.solve(torch.where(both, inverse, eye), lost)
    found = (weight.unsqueeze(-1) - inverse @ u).squeeze(-1)
    return Cut(found.masked_fill(gone, 0), (lost * u).sum((-2, -1)) / 2)


def cut_one_by_one(weight: Tensor, inverse: Tensor, gone: Mask) -> Cut:
    """The same for one quadratic, a weight at a time, the cheapest of those to go first.

    `d = -(w_q / [H^-1]_qq) h_q`, then the inverse loses q: `H^-1 -= h_q h_q^T / [H^-1]_qq`. The order does not matter
    to the result.
    """
    left, rest, open_ = inverse.clone(), weight.clone(), gone.clone()
    loss = torch.zeros((), dtype=weight.dtype, device=weight.device)
    while bool(open_.any()):
        cost = torch.where(open_, rest.square() / left.diagonal().clamp_min(1e-300), torch.inf)
        q = int(cost.argmin())
        column, pivot = left[:, q].clone(), left[q, q].clone()
        loss = loss + rest[q].square() / (2 * pivot)
        rest = rest - rest[q] / pivot * column
        left = left - torch.outer(column, column) / pivot
        left[q], left[:, q] = 0, 0
        left[q, q] = 1
        rest[q] = 0
        open_[q] = False
    return Cut(rest.masked_fill(gone, 0), loss)


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
    """`(damping * I + G^T G / N)^-1 v` from the rows of `G` `(samples, n)` alone; nothing of size n x n is made.

    `(v - G^T (N damping I + G G^T)^-1 G v) / damping`: a system of N unknowns. `v` is `(n,)` or `(n, many)`.
    """
    return (vector - grads.T @ _in_samples(grads, damping, grads @ vector)) / damping


def cut_matrix_free(weight: Tensor, grads: Tensor, gone: Mask, damping: float) -> Cut:
    """`cut` with the inverse of `inverse_product`, for a whole layer: weight, gone `(n,)`, grads `(samples, n)`.

    What stays moves by `G_K^T (N damping I + G_K G_K^T)^-1 G_S w_S`, K what stays and S what goes: the minimum of the
    quadratic over the weights that stay.
    """
    lost, stays = weight * gone, grads * ~gone
    seen = grads @ lost
    answer = _in_samples(stays, damping, seen)
    # the gradients' part of the quadratic is |G d|^2 / N, the damping's |d|^2
    change = stays.T @ answer - lost
    loss = ((grads @ change).square().sum() / len(grads) + damping * change.square().sum()) / 2
    return Cut((weight + change).masked_fill(gone, 0), loss)


def _in_samples(grads: Tensor, damping: float, right: Tensor) -> Tensor:
    """`(N damping I + G G^T)^-1 r`, for r with N rows."""
    kernel = grads @ grads.T
    kernel.diagonal().add_(len(grads) * damping)
    columns = right if right.dim() > 1 else right.unsqueeze(-1)
    solved = torch.cholesky_solve(columns, torch.linalg.cholesky(kernel))
    return solved if right.dim() > 1 else solved.squeeze(-1)
