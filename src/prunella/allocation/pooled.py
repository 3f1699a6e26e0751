"""Allocations that compare scores between groups."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from prunella.allocation.pool import Pool
from prunella.errors import RequestError
from prunella.registry.method import allocation


class Normalise(Enum):
    """How a group's scores are brought to a common scale before groups are compared."""

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
def global_(pools: Sequence[Pool], *, normalise: Normalise = Normalise.NONE, per_cost: bool = False) -> list[Tensor]:
    """One ranking over all groups: the lowest scores go, wherever they are.

    `key = (score - a_l) / c_l`. normalise: `c_l` is 1 (`NONE`), the mean, the maximum, the L2 norm or the root mean
    square of the absolute scores of the group, with `a_l = 0`; or (`STANDARD`) `a_l` is the mean and `c_l` the standard
    deviation of its scores over all units (population), 1 where all are equal. Scaling a layer by 10 moves the split
    unless scores are normalised; norms and sums over more weights are larger, so that wide consumers are spared. May
    take a group down to its minimum: set `min_density=`.

    per_cost: divide also by what one unit weighs in the target's unit, so that the harm for each multiply-add
    (parameter, byte) saved is compared: for units of different size that share a ranking, such as heads and neurons.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model[0].weight.data *= 100  # large weights score high in one ranking
        >>> plan = pr.plan(model, torch.randn(2, 4), pr.Recipe(allocation=pr.global_), target=pr.Sparsity(0.25))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '8 of 8', '1': '4 of 8'}

    Use: scores that mean the same everywhere, such as a change of the loss. Avoid: raw norms, which grow with the size
    of a layer: give normalise=.
    """
    costs = [pool.cost if per_cost and pool.cost > 0 else 1.0 for pool in pools]
    if normalise is Normalise.STANDARD and per_cost:
        raise RequestError(
            "standardised scores cannot be compared per cost",
            "half of them are negative, and dividing them makes what is dear go first",
            "take another normalise=, or per_cost=False",
        )
    shifted = [_centred(pool.scores.double(), normalise) for pool in pools]
    scales = [_scale(values.abs(), normalise) for values in shifted]
    return [values / (scale * cost) for values, scale, cost in zip(shifted, scales, costs, strict=True)]


@allocation(source="Fang et al. 2024, arXiv:2407.04616")
def isomorphic(pools: Sequence[Pool]) -> list[Tensor]:
    """One ranking for each kind of structure: only groups of equal topology are compared, and all kinds give alike.

    `key = (rank + 1/2) / N_k`, the rank among all N_k units of the kind k of group. The kind is what takes part in the
    group and in which role (convolutions, norms, how many of each), not how wide it is, so that norms are compared only
    where they mean the same. With one kind this is `global_`, with as many kinds as groups `uniform`.

    Use: networks that mix attention, depthwise and plain convolutions. Avoid: networks of one kind of layer: it is
    `global_` there.
    """
    kinds: dict[str, list[int]] = {}
    for index, pool in enumerate(pools):
        kinds.setdefault(pool.alike, []).append(index)
    keys: dict[int, Tensor] = {}
    for alike in kinds.values():
        members = alike[::-1]  # of equal scores the last group's go first, as everywhere
        scores = torch.cat([pools[index].scores.double() for index in members])
        ranks = torch.empty(len(scores), dtype=torch.float64)
        ranks[scores.argsort(stable=True)] = (torch.arange(len(scores), dtype=torch.float64) + 0.5) / len(scores)
        parts = torch.split(ranks, [pools[index].size for index in members])
        keys.update(zip(members, parts, strict=True))
    return [keys[index] for index in range(len(pools))]


@allocation(source="Lee et al. 2021, arXiv:2010.07611")
def lamp(pools: Sequence[Pool]) -> list[Tensor]:
    """Layer-adaptive magnitude: a weight against all weights of its layer that are at least as large.

    `key_u = w_u^2 / sum_{v >= u} w_v^2`, suffix sums in float64. The largest of every layer has key 1, so that no
    layer is emptied before the others. Removing in this order is the greedy choice of the smallest relative
    distortion of a layer. Made for `magnitude` with p=1; any score that is not negative takes the place of `|w|`.

    Use: masks by magnitude, at any sparsity. Avoid: scores with a sign, and structure.
    """
    return [_lamp(pool) for pool in pools]


def _lamp(pool: Pool) -> Tensor:
    scores = pool.scores.double()
    if len(scores) and float(scores[0]) < 0:
        raise RequestError(
            f"lamp needs scores that are not negative, {pool.name} has {float(scores[0]):.3g}",
            "it squares them as magnitudes",
            "use global_, or a criterion such as magnitude",
        )
    # The ratio does not depend on the scale, and squares of tiny weights would underflow.
    squares = (scores / scores.max().clamp_min(torch.finfo(torch.float64).tiny)).square()
    suffix = squares.flip(0).cumsum(0).flip(0)
    return torch.where(suffix > 0, squares / suffix.clamp_min(torch.finfo(torch.float64).tiny), 0.0).cummax(0).values


def _centred(scores: Tensor, normalise: Normalise) -> Tensor:
    return scores - scores.mean() if normalise is Normalise.STANDARD and len(scores) else scores


def _scale(values: Tensor, normalise: Normalise) -> Tensor:
    if normalise is Normalise.NONE or not len(values):
        return torch.ones((), dtype=values.dtype)
    by = {
        Normalise.MEAN: torch.mean,
        Normalise.MAX: torch.max,
        Normalise.NORM: torch.linalg.vector_norm,
        Normalise.RMS: _root_mean_square,
        Normalise.STANDARD: _root_mean_square,
    }
    scale: Tensor = by[normalise](values)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
