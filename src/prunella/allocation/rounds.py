"""The allocation of iterative pruning: every round removes a fraction of the survivors of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation


@allocation(source="Frankle and Carbin 2019, arXiv:1803.03635 (the output layer at half the rate)", status="stable")
def per_round(pools: Sequence[Pool], *, rate: float = 0.2, last: float = 0.5) -> list[Tensor]:
    """The same pruning rate for all layers in every round, and a lower rate for the last layer.

    After t rounds `d_l = (1 - p_l)^t` with `p_l = rate`, and `p_l = last * rate` in the last layer. The target
    determines t, which may be fractional. The key is the t at which the unit of rank `r` of `n` is removed,
    `log(1 - (r + 1/2) / n) / log(1 - p_l)`. Scores decide only within a layer.

    rate: in (0, 1), relative to the survivors. last: factor in (0, 1] on the rate of the layer that runs last.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.per_round)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [13, 11]

    Use: iterative pruning of single weights with `prunella.lottery.imp`. Avoid: channels, where the last group is not
    the output of the network.
    """
    check_rates(rate, last)
    return [_key(pool.size, rate * (last if pool is pools[-1] else 1.0)) for pool in pools]


def densities(sizes: Sequence[int], rounds: int, *, rate: float = 0.2, last: float = 0.5) -> list[float]:
    """The density of every layer after `rounds` rounds, in closed form."""
    check_rates(rate, last)
    rates = [rate] * (len(sizes) - 1) + [rate * last] * bool(sizes)
    return [(1 - p) ** rounds for p in rates]


def check_rates(rate: float, last: float) -> None:
    """Errors: RequestError if a rate is out of range."""
    if not 0 < rate < 1 or not 0 < last <= 1:
        raise RequestError(
            f"rate={rate:g}, last={last:g} are out of range",
            "rate is in (0, 1), last in (0, 1]",
            "for example rate=0.2, last=0.5",
        )


def _key(size: int, rate: float) -> Tensor:
    middles = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size
    return torch.log1p(-middles) / math.log1p(-rate)
