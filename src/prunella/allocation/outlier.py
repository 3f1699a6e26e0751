"""Allocations by the distribution of scores within a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.allocation.layerwise import _middles
from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation


@allocation(source="Yin et al. 2024, arXiv:2310.05175")
def owl(pools: Sequence[Pool], *, m: float = 5.0, limit: float = 0.08) -> list[Tensor]:
    """Lower sparsity for layers with more outliers (OWL).

    `D_l = fraction of the scores above m * mean(scores of l)`; at sparsity S layer l gives
    `s_l = S - t (D_l - D)`, with D the mean over weights and t such that the largest `|s_l - S|` is `limit`: the mean
    over weights is S. The key of rank r of n is the S at which `(r + 1/2) / n = s_l`.

    m: above 0, the paper uses 5 to 10 with `wanda`. limit: in [0, 1), largest distance of a layer from the mean.
    Layers with equal fractions of outliers get equal sparsity, as under `uniform`.
    Errors: RequestError for knobs out of range.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.wanda, pr.Element(), pr.allocation.owl)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5), data=[x])
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [16, 8]

    Use: single weights of language models above 60 %, with `wanda`. Avoid: N:M, whose sparsity is fixed, and structured
    pruning.
    """
    if m <= 0 or not 0 <= limit < 1:
        raise RequestError(f"owl cannot use m={m:g}, limit={limit:g}", "m is above 0 and limit in [0, 1)", "m=5")
    ratios = torch.stack([_outliers(pool, m) for pool in pools])
    sizes = torch.tensor([float(pool.size) for pool in pools], dtype=torch.float64, device="cpu")
    offsets = ratios - (ratios * sizes).sum() / sizes.sum()
    widest = offsets.abs().max()
    shifts = -limit * offsets / widest if widest > 1e-12 else torch.zeros_like(offsets)
    return [_middles(pool.size) - shift for pool, shift in zip(pools, shifts, strict=True)]


def _outliers(pool: Pool, m: float) -> Tensor:
    return (pool.scores.double() > m * pool.scores.double().mean()).double().mean()
