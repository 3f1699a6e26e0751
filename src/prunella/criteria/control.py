"""Controls of a criterion: tests whether the order of its scores matters, and not only the sparsity of each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.registry.controlled import Controlled, Criterion
from prunella.registry.method import control


def _negated(scores: Tensor, generator: torch.Generator) -> Tensor:
    return -scores


def _permuted(scores: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(scores.numel(), generator=generator, device="cpu").to(scores.device)
    return scores.flatten()[order].view(scores.shape)


@control(source="Frankle et al. 2021, arXiv:2009.08576", status="stable")
def inverted(of: Criterion) -> Controlled:
    """A criterion with its order reversed: the units that it would remove first are kept.

    `s' = -s`, of the finished scores of units or weights. Data: that of the criterion. If the inverse prunes as well as
    the criterion, the order of the criterion does not matter.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.criteria.inverted(pr.magnitude), pr.Element())
        >>> print(pr.plan(model, x, recipe, target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: as the control of a criterion that beats random. Avoid: allocations that divide by scores, such as `lamp`,
    which need non-negative scores.
    """
    return Controlled(inverted, of, _negated)


@control(source="Frankle et al. 2021, arXiv:2009.08576; Su et al. 2020, arXiv:2009.11094")
def shuffled(of: Criterion) -> Controlled:
    """A criterion with its scores permuted within each layer or group.

    `s'_i = s_pi(i)` with `pi` drawn from the recipe's seed, one permutation for each layer or group. Every layer loses
    exactly as many units (weights) as under the criterion, but other ones. Data: that of the criterion.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe = pr.Recipe(pr.criteria.shuffled(pr.magnitude), pr.Element())
        >>> print(pr.plan(model, x, recipe, target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: a test whether a criterion finds good weights or only good sparsities per layer. Avoid: `uniform` on plain
    layers, where it is the same as `random`.
    """
    return Controlled(shuffled, of, _permuted)
