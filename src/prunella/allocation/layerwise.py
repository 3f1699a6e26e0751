"""Allocations that fix each layer's share from its size or shape; scores are compared within a layer only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.budget import Pool
from prunella.method import allocation


@allocation(source="Gale et al. 2019, arXiv:1902.09574; Li et al. 2017, arXiv:1608.08710")
def uniform(pools: Sequence[Pool]) -> list[Tensor]:
    """Every group gives the same fraction.

    `key_r = (r + 1/2) / n` for the unit of rank `r` of `n`. Scores decide only within a group. Groups that matter much
    and groups that do not are treated alike: compare with `global_`.

    Use: results that must have equal widths, and as a baseline. Avoid: networks with a few sensitive layers.
    """
    return [_middles(pool.size) for pool in pools]


@allocation(source="Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134")
def erk(pools: Sequence[Pool]) -> list[Tensor]:
    """Erdos-Renyi-Kernel: density in proportion to the sum of a weight's dimensions over their product.

    `d_l = min(1, eps * sum(dims_l) / prod(dims_l))` with `eps` such that the target is met, kernel dimensions included.
    Small layers stay dense, wide ones give most. As a key: the `-eps` at which a unit of that rank falls,
    `-(1 - (r + 1/2) / n) * prod(dims) / sum(dims)`; the cap at 1 and the re-solving after it come by themselves.
    Meant for masks. For channels the producer's weight gives the dimensions.

    Use: masks at high sparsity, and drop-and-grow training. Avoid: budgets of multiply-adds: early layers stay dense.
    """
    return [(_middles(pool.size) - 1) / _raw(pool.shape) for pool in pools]


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """The densities of `erk` in closed form, for weights of these shapes and an overall density in (0, 1].

    Layers that would exceed 1 are set to 1 and the others solved again, until none does. The mean, weighted by size,
    is `density` exactly.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raws = [_raw(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest:
            return [1.0] * len(shapes)
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raws[i] * sizes[i] for i in rest)
        over = {i for i in rest if scale * raws[i] > 1}
        if not over:
            return [1.0 if i in dense else scale * raws[i] for i in range(len(shapes))]
        dense |= over


def _middles(size: int) -> Tensor:
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def _raw(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)
