"""Allocations that compare scores between groups."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation


class Normalize(Enum):
    """Scaling of the scores of each group before groups are compared."""

    NONE = "none"
    MEAN = "mean"
    MAX = "max"
    NORM = "norm"
    RMS = "rms"
    STANDARD = "standard"


@allocation(
    source="Han et al. 2015, arXiv:1506.02626; Molchanov et al. 2017, arXiv:1611.06440 (`NORM`); "
    "An et al. 2024, arXiv:2312.11983 (`STANDARD`)",
    status="stable",
)
def global_(pools: Sequence[Pool], *, normalize: Normalize = Normalize.NONE, per_cost: bool = False) -> list[Tensor]:
    """One ranking over all groups: the lowest scores of the model are removed.

    `key = (score - a_l) / c_l`. normalize: `c_l` is 1 (`NONE`), the mean, the maximum, the L2 norm or the root mean
    square of the absolute scores of the group, with `a_l = 0`; or (`STANDARD`) `a_l` is the mean and `c_l` the standard
    deviation of its scores over all units (population), 1 where all are equal. Scaling a layer by 10 moves the split
    unless scores are normalized. Norms and sums grow with the number of weights, which spares wide consumers. A group
    may fall to its minimum: set `min_density=`.

    per_cost: also divide by the cost of one unit in the unit of the target. This compares the harm for each
    multiply-add (parameter, byte) saved. Meant for units of different size in one ranking, such as heads and neurons.
    Errors: RequestError for `STANDARD` with per_cost.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model[0].weight.data *= 100  # large weights score high in one ranking
        >>> plan = pr.plan(model, torch.randn(2, 4), pr.Recipe(allocation=pr.global_), target=pr.Sparsity(0.25))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '8 of 8', '1': '4 of 8'}

    Use: scores with one meaning in all groups, such as a change of the loss. Avoid: raw norms, which grow with the size
    of a layer: give normalize=.
    """
    costs = [pool.cost if per_cost and pool.cost > 0 else 1.0 for pool in pools]
    if normalize is Normalize.STANDARD and per_cost:
        raise RequestError(
            "standardized scores cannot be compared per cost",
            "half of them are negative, and division by the cost would remove expensive units first",
            "take another normalize=, or per_cost=False",
        )
    shifted = [_centered(pool.scores.double(), normalize) for pool in pools]
    scales = [_scale(values.abs(), normalize) for values in shifted]
    return [values / (scale * cost) for values, scale, cost in zip(shifted, scales, costs, strict=True)]


@allocation(source="Fang et al. 2024, arXiv:2407.04616")
def isomorphic(pools: Sequence[Pool]) -> list[Tensor]:
    """One ranking for each topology of groups, and the same sparsity for all topologies.

    `key = (rank + 1/2) / N_k`, the rank among all N_k units of groups of topology k. The topology lists the members of
    a group and their roles (convolutions, norms, the number of each), not its width. Norms are therefore compared only
    where they have the same meaning. With one topology it is `global_`, with one per group `uniform`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.isomorphic)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [16, 8]

    Use: networks that mix attention, depthwise and plain convolutions. Avoid: networks of one kind of layer, where it
    is `global_`.
    """
    kinds: dict[str, list[int]] = {}
    for index, pool in enumerate(pools):
        kinds.setdefault(pool.topology, []).append(index)
    keys: dict[int, Tensor] = {}
    for indices in kinds.values():
        members = indices[::-1]  # of equal scores those of the last group are removed first, as in every selection
        scores = torch.cat([pools[index].scores.double() for index in members])
        ranks = torch.empty(len(scores), dtype=torch.float64, device="cpu")
        middles = (torch.arange(len(scores), dtype=torch.float64, device="cpu") + 0.5) / len(scores)
        ranks[scores.argsort(stable=True)] = middles
        parts = torch.split(ranks, [pools[index].size for index in members])
        keys.update(zip(members, parts, strict=True))
    return [keys[index] for index in range(len(pools))]


@allocation(source="Lee et al. 2021, arXiv:2010.07611")
def lamp(pools: Sequence[Pool]) -> list[Tensor]:
    """Layer-adaptive magnitude: each weight relative to all weights of its layer that are at least as large.

    `key_u = w_u^2 / sum_{v >= u} w_v^2`, suffix sums in float64. The largest weight of every layer has key 1, so that
    no layer is emptied before the others. This order is the greedy choice of the smallest relative distortion of a
    layer. Made for `magnitude` with p=1; any non-negative score may take the place of `|w|`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.lamp)
        >>> plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
        >>> [int(mask.sum()) for mask in plan.masks.values()]
        [13, 11]

    Use: masks by magnitude, at any sparsity. Avoid: scores with a sign, and structured pruning.
    """
    return [_lamp(pool) for pool in pools]


def _lamp(pool: Pool) -> Tensor:
    scores = pool.scores.double()
    if len(scores) and float(scores[0]) < 0:
        raise RequestError(
            f"lamp needs non-negative scores, {pool.name} has {float(scores[0]):.3g}",
            "lamp squares the scores as magnitudes",
            "use global_, or a criterion such as magnitude",
        )
    # The ratio does not depend on the scale, and squares of tiny weights would underflow.
    squares = (scores / scores.max().clamp_min(torch.finfo(torch.float64).tiny)).square()
    suffix = squares.flip(0).cumsum(0).flip(0)
    return torch.where(suffix > 0, squares / suffix.clamp_min(torch.finfo(torch.float64).tiny), 0.0).cummax(0).values


def _centered(scores: Tensor, normalize: Normalize) -> Tensor:
    return scores - scores.mean() if normalize is Normalize.STANDARD and len(scores) else scores


def _scale(values: Tensor, normalize: Normalize) -> Tensor:
    if normalize is Normalize.NONE or not len(values):
        return torch.ones((), dtype=values.dtype, device="cpu")
    by = {
        Normalize.MEAN: torch.mean,
        Normalize.MAX: torch.max,
        Normalize.NORM: torch.linalg.vector_norm,
        Normalize.RMS: _root_mean_square,
        Normalize.STANDARD: _root_mean_square,
    }
    scale: Tensor = by[normalize](values)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
