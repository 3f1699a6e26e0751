"""Criteria that need gradients of the loss: pass data= and loss=."""

from __future__ import annotations

import torch

from prunella.registry.criterion import criterion
from prunella.types import GateGrad, Grad, GradSq, Saliency, Scores, Weight


@criterion(source="Molchanov et al. 2019, arXiv:1906.10771; Michel et al. 2019, arXiv:1905.10650", status="stable")
def taylor(gate_grad: GateGrad) -> Scores:
    """Squared change of the loss, to first order, when a unit is gated off.

    `s_u = mean_b (dL_b/dz_u)^2` at a gate `z_u = 1`, which is `(sum_{w in u} g_w w)^2` over the weights that read the
    unit. The sum comes before the square, and the square before the mean over batches. For single weights it is
    `mean_b (g w)^2`, the same as `taylor_sq`, which needs less memory there.
    Data: batches and a loss; the score depends on the batch size, since gradients within a batch are averaged.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> data = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(2)]
        >>> loss = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> plan = pr.plan(model, data[0][0], pr.Recipe(pr.taylor), target=pr.Sparsity(0.25), data=data, loss=loss)
        >>> int(plan.keep["0"].sum())
        12

    Use: channels, heads and blocks with a loss and some batches. Avoid: networks at a minimum of the same batches,
    where gradients vanish.
    """
    return gate_grad.square().mean(0)


@criterion(source="Molchanov et al. 2019, arXiv:1906.10771, equation 8", status="stable")
def taylor_sq(weight: Weight, grad_sq: GradSq) -> Saliency:
    """Squared first-order change of the loss for each weight on its own.

    `S_ij = mean_b (g_ij w_ij)^2`; a unit scores the sum over its weights, as if they were independent. `taylor` sums
    before the square instead. Data: batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.criteria.taylor_sq(weight, torch.ones(2, 2)).tolist()
        [[1.0, 9.0], [0.25, 4.0]]

    Use: single weights with a loss, in the memory of one gradient. Avoid: channels, where signs cancel inside a unit:
    take `taylor`.
    """
    return weight.square() * grad_sq


@criterion(source="Molchanov et al. 2017, arXiv:1611.06440", status="stable")
def taylor_abs(gate_grad: GateGrad, *, normalize: bool = True) -> Scores:
    """Absolute change of the loss, to first order, when a unit is gated off, rescaled within each layer.

    `s_u = mean_b |dL_b/dz_u|` at a gate `z_u = 1`: the sum over the unit's activations (or, the same, over the weights
    that read it) comes before the absolute value, and that before the mean over batches. Batches of one sample give the
    paper's mean over examples. normalize: divide by the L2 norm of the scores of the group, as the paper does to
    compare layers. Data: batches and a loss.

    Use: rankings over layers of very different scale. Avoid: scores that must add up over groups: take `taylor`.
    """
    scores = gate_grad.abs().mean(0)
    return scores / scores.norm().clamp_min(torch.finfo(scores.dtype).tiny) if normalize else scores


@criterion(source="Michel et al. 2019, arXiv:1905.10650")
def head_importance(gate_grad: GateGrad) -> Scores:
    """Expected sensitivity of the loss to the mask of a head.

    `I_h = mean_b |dL_b/dxi_h|` at a mask `xi_h = 1`, which is `mean_b |<A_h, dL_b/dA_h>|` with `A_h` the output of the
    head before the projection that mixes the heads. Applies to every unit with a gate; heads of one key-value group
    form one unit. Data: batches and a loss; batches of one sample give the mean over samples.

    Use: `Head()` with a loss. Avoid: one ranking of heads and channels: take `taylor`, whose scores add up.
    """
    return gate_grad.abs().mean(0)


@criterion(source="Sanh et al. 2020, arXiv:2005.07683")
def movement(weight: Weight, grad: Grad) -> Saliency:
    """Movement of a weight away from zero under a step down the gradient.

    `S_ij = -W_ij * mean_b (dL_b/dW_ij)`: positive where the weight would grow in size, negative where it would shrink.
    The paper sums this score over fine-tuning. Here one pass over the data gives one summand, without updates of the
    weights. Data: batches and a loss of the new task.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> grad = torch.tensor([[0.1, 0.2], [-0.4, 0.0]])
        >>> pr.criteria.movement(weight, grad)
        tensor([[-0.1000,  0.6000],
                [ 0.2000, -0.0000]])

    Use: pretrained models on a new task, before or during fine-tuning. Avoid: models at a minimum of the same task,
    where every gradient is noise.
    """
    return -weight * grad
