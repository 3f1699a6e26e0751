"""Learned soft thresholds, one for each layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.train.gates.gate import Gate, M, attach_
from prunella.train.penalty.proximal import soft_threshold
from prunella.train.penalty.units import CoupledUnits


class SoftThreshold(Gate):
    """A soft threshold `sigmoid(s)` on one weight."""

    def __init__(self, weight: Tensor, start: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(float(start), dtype=weight.dtype, device=weight.device))

    def cost(self, weight: Tensor) -> Tensor:
        """`s^2 / 2`, the weight decay of `s`: as `s` rises toward 0, the threshold rises."""
        return self.s.square() / 2

    def forward(self, weight: Tensor) -> Tensor:
        """The soft-thresholded weight."""
        return soft_threshold(weight, torch.sigmoid(self.s))


@training(source="Kusupati et al. 2020, arXiv:2002.03231 (STR)")
def learned_threshold_(model: M, units: CoupledUnits, *, start: float = -8.0) -> M:
    """Soft threshold reparameterization (STR), in place: each layer learns the threshold below which weights are zero.

    `W' = sign(W) max(|W| - sigmoid(s), 0)`, and `dL/ds = -sigmoid'(s) sum over active of sign(W) dL/dW'`.
    `gate_penalty` is `sum s^2 / 2`, the paper's weight decay of s: while s is below 0 the penalty raises the threshold,
    up to 1/2. Data: training. `merge_gates_` writes W' as plain weights; the output does not change.

    start: of s, finite, below 0; sigmoid(-8) = 0.0003 is far below the weights of a common layer.
    units: from `coupled_units`. Errors: RequestError for a start that is not finite.

    Use: unstructured sparsity in training, with a learned sparsity for each layer. Avoid: an exact sparsity.
    """
    if not math.isfinite(start):
        raise RequestError(f"start={start} is out of range", "s is a finite number", "-8 starts near zero")
    named = units.named(model)
    return attach_(model, {x.entity: [SoftThreshold(named[x.entity].detach(), start)] for x in units.layers})
