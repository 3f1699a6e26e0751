"""Controls: one criterion made of another, to see whether its order, and not only its sparsities, does the work."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.registry.controlled import Controlled, Criterion
from prunella.registry.method import control


def _negated(scores: Tensor, generator: torch.Generator) -> Tensor:
    return -scores


def _permuted(scores: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(scores.numel(), generator=generator).to(scores.device)
    return scores.flatten()[order].view(scores.shape)


@control(source="Frankle et al. 2021, arXiv:2009.08576", status="stable")
def inverted(of: Criterion) -> Controlled:
    """Another criterion with its order reversed: what it would remove first is kept.

    `s' = -s`, of the finished scores of units or weights. Data: what the other criterion needs. A criterion whose
    inverse prunes as well as itself orders nothing that matters.

    Use: as the control of a criterion that beats random. Avoid: with allocations that divide by scores, as `lamp`,
    which mean nothing below zero.
    """
    return Controlled(inverted, of, _negated)


@control(source="Frankle et al. 2021, arXiv:2009.08576; Su et al. 2020, arXiv:2009.11094")
def shuffled(of: Criterion) -> Controlled:
    """Another criterion with its scores dealt out anew within each layer or group.

    `s'_i = s_pi(i)` with `pi` drawn from the recipe's seed, one permutation for each layer or group: every layer loses
    exactly as many units (weights) as under the other criterion, but other ones. Data: what the other one needs.

    Use: to tell whether a criterion finds good weights or only good sparsities per layer. Avoid: with `uniform` on
    plain layers, where it is the same as `random`.
    """
    return Controlled(shuffled, of, _permuted)
