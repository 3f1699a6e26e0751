"""Criteria for networks that have not been trained: what a weight does for the gradients, or for the flow through."""

from __future__ import annotations

import torch

from prunella.registry.method import criterion
from prunella.types import Flow, Grad, HessianGrad, Saliency, TotalSlope, Weight


@criterion(source="Lee et al. 2019, arXiv:1810.02340", status="stable")
def snip(weight: Weight, grad: Grad, total_slope: TotalSlope) -> Saliency:
    """How strongly the loss reacts when a connection is weakened (SNIP).

    `S_ij = |g_ij w_ij| / sum |g w|`, the sum over everything that is scored: the size of `dL/dc` at a gate `c = 1` on
    the weight. Gradients are averaged over batches before the absolute value, so that many batches and one large batch
    agree. Data: batches and a loss.

    Use: one cut before training, up to about 95 %. Avoid: beyond that in one step, where layers empty: take
    `iterative_snip` or `force`.
    """
    return (weight * grad).abs() / total_slope.clamp_min(torch.finfo(total_slope.dtype).tiny)


@criterion(source="Wang et al. 2020, arXiv:2002.07376", status="stable")
def grasp(weight: Weight, hessian_grad: HessianGrad, *, temperature: float = 200.0) -> Saliency:
    """What a weight does for the flow of gradients: what weakens it goes first (GraSP).

    `S_ij = w_ij (H g)_ij`, the derivative of `||g||^2 / 2` to a gate on the weight. The paper ranks `-w Hg` and removes
    the highest; here, as everywhere, higher is kept. Data: few batches and a loss that takes the output of the model as
    logits; memory holds the graphs of all batches. temperature: above 0; the output is divided by it first.

    Use: high sparsity before training, with a loss. Avoid: moderate sparsity, where it ranks below `snip` and plain
    magnitude; scores have a sign, so `lamp` refuses them.
    """
    return weight * hessian_grad


@criterion(source="Tanaka et al. 2020, arXiv:2006.05467", status="stable")
def synflow(weight: Weight, flow: Flow) -> Saliency:
    """What part of the flow from input to output runs through a weight (SynFlow).

    `S = |w| dR/d|w|` with `R` the sum over all paths of the product of the absolute weights. In a chain of layers
    without biases every layer's scores add up to `R`, so that a layer is emptied in one step if it is wide, and
    never when pruned in many rounds.
    Data: none; the example's shape only. Made for ReLU; biases count as zero, batch normalisation as neutral.

    Use: extreme sparsity before training, in a hundred rounds: `synflow_rounds`. Avoid: one round: it empties the
    widest layers first.
    """
    return weight.abs() * flow
