"""Allocations by the size or shape of each layer. Scores are compared within a layer only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation


@allocation(source="Gale et al. 2019, arXiv:1902.09574; Li et al. 2017, arXiv:1608.08710", status="stable")
def uniform(pools: Sequence[Pool]) -> list[Tensor]:
    """The same sparsity for every group.

    `key_r = (r + 1/2) / n` for the unit of rank `r` of `n`. Scores decide only within a group. Sensitive and robust
    groups get the same sparsity: compare with `global_`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))
        >>> plan = pr.plan(model, torch.randn(2, 4), pr.Recipe(allocation=pr.uniform), target=pr.Sparsity(0.5))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '4 of 8', '1': '8 of 16'}

    Use: results that must have equal widths, and as a baseline. Avoid: networks with a few sensitive layers.
    """
    return [_middles(pool.size) for pool in pools]


@allocation(source="Gale et al. 2019, arXiv:1902.09574")
def uniform_plus(pools: Sequence[Pool], *, last: float = 0.8) -> list[Tensor]:
    """Uniform sparsity, with the first convolution kept dense and the sparsity of the last layer bounded.

    `s_first = 0`, `s_last = min(s, last)`, `s_l = s` for all others, with `s` such that the target is met. The keys are
    those of `uniform`. Spared weights come after all others, the last layer before the first convolution, so that
    targets beyond the other layers are still met. The first convolution is the first pool whose weight has a kernel, if
    any. The last layer is the last pool of at least two.

    last: in [0, 1], largest sparsity of the last layer.
    Errors: RequestError for `last` out of range.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.uniform_plus)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [16, 8]

    Use: masks on convolutional networks, where it costs nothing and beats `uniform`. Avoid: structured pruning, where
    the last pool is not the classifier.
    """
    if not 0 <= last <= 1:
        raise RequestError(f"uniform_plus cannot use last={last:g}", "it is a fraction", "last=0.8")
    keys = [_middles(pool.size) for pool in pools]
    if len(pools) < 2:
        return keys
    keys[-1] = torch.where(keys[-1] < last, keys[-1], keys[-1] + 1)
    first = next((i for i, pool in enumerate(pools[:-1]) if len(pool.shape) > 2), None)
    if first is not None:
        keys[first] = keys[first] + 2
    return keys


@allocation(source="Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134", status="stable")
def erk(pools: Sequence[Pool]) -> list[Tensor]:
    """Erdos-Renyi-Kernel: density in proportion to the sum of a weight's dimensions over their product.

    `d_l = min(1, eps * sum(dims_l) / prod(dims_l))` with `eps` such that the target is met, kernel dimensions included.
    Small layers are kept dense, wide layers become most sparse. The key is the `-eps` at which a unit of that rank is
    removed, `-(1 - (r + 1/2) / n) * prod(dims) / sum(dims)`. This key implies the cap at 1 and the new solution after
    it. Meant for masks. For channels the producer's weight gives the dimensions.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.erk)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [13, 11]

    Use: masks at high sparsity, and drop-and-grow training. Avoid: MACs targets, since early layers are kept dense.
    """
    return [(_middles(pool.size) - 1) / _raw(pool.shape) for pool in pools]


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """The densities of `erk` in closed form, for weights of these shapes and an overall density in (0, 1].

    A layer above 1 is set to 1 and the others are solved again, until no layer exceeds 1. The mean, weighted by size,
    is exactly `density`.

    Example:

        >>> import prunella as pr
        >>> densities = pr.allocation.erk_densities([(300, 784), (100, 300), (10, 100)], 0.1)
        >>> [round(density, 4) for density in densities]
        [0.0796, 0.2302, 1.0]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raws = [_raw(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        if not sparse:
            return [1.0] * len(shapes)
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raws[i] * sizes[i] for i in sparse)
        over = {i for i in sparse if scale * raws[i] > 1}
        if not over:
            return [1.0 if i in dense else scale * raws[i] for i in range(len(shapes))]
        dense |= over


def _middles(size: int) -> Tensor:
    return (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size


def _raw(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)
