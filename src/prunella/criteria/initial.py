"""Criteria at initialization: the effect of a weight on the loss, on the gradients, or on the flow."""

from __future__ import annotations

import torch

from prunella.registry.criterion import criterion
from prunella.types import Flow, Grad, HessianGrad, Saliency, TotalSlope, Weight


@criterion(source="Lee et al. 2019, arXiv:1810.02340", status="stable")
def snip(weight: Weight, grad: Grad, total_slope: TotalSlope) -> Saliency:
    """Sensitivity of the loss to a connection (SNIP).

    `S_ij = |g_ij w_ij| / sum |g w|`, the sum over all scored weights: the size of `dL/dc` at a gate `c = 1` on the
    weight. Gradients are averaged over batches before the absolute value, so that many batches and one large batch
    agree.
    Data: batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> grad = torch.tensor([[0.1, 0.2], [-0.4, 0.0]])
        >>> pr.criteria.snip(weight, grad, (grad * weight).abs().sum())
        tensor([[0.1111, 0.6667],
                [0.2222, 0.0000]])

    Use: one-shot pruning before training, up to about 95 %. Avoid: higher sparsity in one step, where layers become
    empty: take `iterative_snip` or `force`.
    """
    return (weight * grad).abs() / total_slope.clamp_min(torch.finfo(total_slope.dtype).tiny)


@criterion(source="Wang et al. 2020, arXiv:2002.07376", status="stable")
def grasp(weight: Weight, hessian_grad: HessianGrad, *, temperature: float = 200.0) -> Saliency:
    """Contribution of a weight to the gradient flow: weights that reduce the flow are removed first (GraSP).

    `S_ij = w_ij (H g)_ij`, the derivative of `||g||^2 / 2` to a gate on the weight. The paper ranks `-w Hg` and removes
    the highest; here, as in all criteria, higher is kept. Data: few batches and a loss that takes the output of the
    model as logits; memory holds the graphs of all batches. temperature: above 0; the output is divided by it first.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> grad = torch.tensor([[0.1, 0.2], [-0.4, 0.0]])
        >>> pr.criteria.grasp(weight, grad)
        tensor([[ 0.1000, -0.6000],
                [-0.2000,  0.0000]])

    Use: high sparsity before training, with a loss. Avoid: moderate sparsity, where `snip` and magnitude are better;
    and `lamp`, which refuses scores with a sign.
    """
    return weight * hessian_grad


@criterion(source="Tanaka et al. 2020, arXiv:2006.05467", status="stable")
def synflow(weight: Weight, flow: Flow) -> Saliency:
    """Flow from input to output through a weight (SynFlow).

    `S = |w| dR/d|w|` with `R` the sum over all paths of the product of the absolute weights. In a chain of layers
    without biases the scores of every layer sum to `R`. One step therefore empties a wide layer; many rounds never do.
    Data: none; the example's shape only. Made for ReLU; biases count as zero, batch normalization as neutral.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.synflow(weight, torch.ones(2, 2)).tolist()
        [[1.0, 3.0], [0.5, 2.0]]

    Use: extreme sparsity before training, in a hundred rounds: `synflow_rounds`. Avoid: one round, which empties the
    widest layers first.
    """
    return weight.abs() * flow
