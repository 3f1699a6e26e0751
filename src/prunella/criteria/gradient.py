"""Criteria that need gradients of the loss: pass data= and loss=."""

from __future__ import annotations

from prunella.method import criterion
from prunella.types import GateGrad, GradSq, Saliency, Scores, Weight


@criterion(source="Molchanov et al. 2019, arXiv:1906.10771; Michel et al. 2019, arXiv:1905.10650")
def taylor(gate_grad: GateGrad) -> Scores:
    """Squared change of the loss, to first order, when a unit is gated off.

    `s_u = mean_b (dL_b/dz_u)^2` at a gate `z_u = 1`, which is `(sum_{w in u} g_w w)^2` over the weights that read the
    unit: the sum comes before the square, and the square before the mean over batches. For single weights it is
    `mean_b (g w)^2`, the same as `taylor_sq`, which needs less memory there.
    Data: batches and a loss; the score depends on the batch size, since gradients within a batch are averaged.

    Use: channels, heads and blocks with a loss and some batches. Avoid: a network at a minimum of the same batches,
    where gradients vanish.
    """
    return gate_grad.square().mean(0)


@criterion(source="Molchanov et al. 2019, arXiv:1906.10771, equation 8")
def taylor_sq(weight: Weight, grad_sq: GradSq) -> Saliency:
    """Squared first-order change of the loss for each weight on its own.

    `S_ij = mean_b (g_ij w_ij)^2`; a unit scores the sum over its weights, as if they were independent. This is not
    `taylor`, which adds before it squares. Data: batches and a loss.

    Use: single weights with a loss, in the memory of one gradient. Avoid: channels, where signs cancel inside a unit:
    take `taylor`.
    """
    return weight.square() * grad_sq
