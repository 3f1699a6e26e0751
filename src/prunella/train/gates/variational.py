"""Sparse variational dropout: weights with more noise than signal are removed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.train.gates.gate import Gate, M, Noisy, attach_
from prunella.train.penalty.units import CoupledUnits

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""The fit of the divergence to the log-uniform prior."""


def divergence(log_alpha: Tensor) -> Tensor:
    """KL divergence of each weight's posterior to the log-uniform prior, approximated; 0 where the noise is infinite.

    `k1 - k1 sigmoid(k2 + k3 log_alpha) + log(1 + 1 / alpha) / 2`.
    """
    return K1 * torch.sigmoid(-(K2 + K3 * log_alpha)) + softplus(-log_alpha) / 2


class Variational(Gate, Noisy):
    """Gaussian noise of variance `sigma^2` on every weight."""

    def __init__(self, weight: Tensor, start: float, limit: float) -> None:
        super().__init__()
        self.log_sigma2 = nn.Parameter(torch.full_like(weight, start))
        self.limit = limit
        self.noise = torch.zeros_like(weight)

    def draw(self) -> None:
        """Normal noise for one pass: all samples of the batch see the same noise."""
        self.noise = torch.randn_like(self.log_sigma2.detach())

    def log_alpha(self, weight: Tensor) -> Tensor:
        """Logarithm of the variance over the squared mean."""
        return self.log_sigma2 - (weight.square() + torch.finfo(weight.dtype).tiny).log()

    def cost(self, weight: Tensor) -> Tensor:
        """The divergence, summed over the weights."""
        return divergence(self.log_alpha(weight)).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """In training the weight with noise; in evaluation the weight, zero where `log_alpha` exceeds the limit."""
        if self.training:
            return weight + (self.log_sigma2 / 2).exp() * self.noise.to(weight)
        return weight * (self.log_alpha(weight) <= self.limit)


@training(source="Molchanov D. et al. 2017, arXiv:1701.05369")
def variational_dropout_(model: M, units: CoupledUnits, *, start: float = -10.0, limit: float = 3.0) -> M:
    """Sparse variational dropout, in place: every weight learns its noise, and weights that are mostly noise are zero.

    `W' = W + sigma e`, `e ~ N(0, 1)`, `log_alpha = log sigma^2 - log W^2`. `gate_penalty` is the divergence to the
    log-uniform prior, `sum k1 - k1 sigmoid(k2 + k3 log_alpha) + log(1 + 1 / alpha) / 2` with k = (0.63576, 1.8732,
    1.48695). With a mean loss, add the penalty with strength 1 / (training samples), rising from 0 over the first part
    of training. In evaluation, and permanently after `merge_gates_`, weights with `log_alpha > limit` are zero.
    Data: training. The noise is on the weights, drawn once per pass: it has more variance than the local
    reparameterization of the paper, and needs no rule for each type of layer.

    start: of log sigma^2, finite; -10 is little noise. limit: of log_alpha; 3 is a dropout rate of 0.95.
    units: from `coupled_units`. Errors: RequestError for numbers that are not finite.

    Use: high unstructured sparsity without a budget, in long training. Avoid: short training or a large learning rate.
    """
    if not (math.isfinite(start) and math.isfinite(limit)):
        what = f"start={start}, limit={limit} are out of range"
        raise RequestError(what, "both are finite numbers", "-10 and 3 are usual")
    named = units.named(model)
    return attach_(model, {x.entity: [Variational(named[x.entity].detach(), start, limit)] for x in units.layers})
