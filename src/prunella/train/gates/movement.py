"""Movement pruning: weights that training moves toward zero are pruned, whatever their magnitude."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.schedules import Schedule, cubic
from prunella.selection import keep_top
from prunella.train.gates.gate import Gate, M, Scheduled, attach_
from prunella.train.penalty.units import CoupledUnits
from prunella.types import Mask


class _StraightThrough(torch.autograd.Function):
    """`W * mask`; the gradient of the mask goes to the scores."""

    @staticmethod
    def forward(ctx, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        weight, mask = ctx.saved_tensors
        return grad * mask, grad * weight, None


def masked(weight: Tensor, scores: Tensor, mask: Mask) -> Tensor:
    """`W * mask`, with `dL/dS = dL/dW' * W` for the scores."""
    product: Tensor = _StraightThrough.apply(weight, scores, mask.to(weight))  # type: ignore[no-untyped-call]
    return product


class Moved(Gate, Scheduled):
    """A gate that keeps the highest scores; their number falls along the schedule."""

    def __init__(self, weight: Tensor, sparsity: float, schedule: Schedule) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.sparsity, self.schedule, self.progress = sparsity, schedule, 0.0

    def set_progress(self, progress: float) -> None:
        """Set the progress of training, in [0, 1]."""
        self.progress = progress

    def mask(self) -> Mask:
        """Exactly `round(sparsity * schedule(progress) * N)` weights are False."""
        count = self.scores.numel()
        pruned = round(self.sparsity * self.schedule(self.progress) * count)
        return keep_top(self.scores.detach().flatten(), count - pruned).view_as(self.scores)

    def cost(self, weight: Tensor) -> Tensor:
        """Zero: the schedule determines the sparsity."""
        return self.scores.new_zeros(())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under the mask."""
        return masked(weight, self.scores, self.mask())


class SoftlyMoved(Gate):
    """A gate that keeps scores above a threshold."""

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.threshold = threshold

    def mask(self) -> Mask:
        """True where `sigmoid(S)` is above the threshold."""
        return torch.sigmoid(self.scores.detach()) > self.threshold

    def cost(self, weight: Tensor) -> Tensor:
        """`sum sigmoid(S)`."""
        return torch.sigmoid(self.scores).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under the mask."""
        return masked(weight, self.scores, self.mask())


@training(source="Sanh et al. 2020, arXiv:2005.07683")
def top_movement_(model: M, units: CoupledUnits, *, sparsity: float, schedule: Schedule = cubic) -> M:
    """Movement pruning, in place: every weight has a score, which rises while training moves the weight away from zero.

    `W' = W * mask`, the mask keeps the highest scores S of each layer, and `dL/dS = dL/dW' * W` straight through, so
    that gradient descent gives `S = -eta sum (dL/dW') W`: weights that shrink score below zero. Data: training.
    At progress t exactly `round(sparsity * schedule(t) * N)` weights of each layer are zero: call `step_gates_` after
    each step, and `merge_gates_` at the end. The value of a pruned weight does not change, but its score is still
    trained, so that the weight may come back.

    sparsity: in [0, 1), of each layer. schedule: progress in [0, 1] -> fraction of the sparsity.
    units: from `coupled_units`. Errors: RequestError for a sparsity out of range.

    Use: fine-tuning a pretrained model on a small task, at high sparsity. Avoid: training from scratch.
    """
    if not 0 <= sparsity < 1:
        raise RequestError(f"sparsity={sparsity:g} is out of range", "0 <= sparsity < 1", "0.9 removes 90 %")
    named = units.named(model)
    return attach_(model, {x.entity: [Moved(named[x.entity].detach(), sparsity, schedule)] for x in units.layers})


@training(source="Sanh et al. 2020, arXiv:2005.07683 (soft movement)")
def soft_movement_(model: M, units: CoupledUnits, *, threshold: float = 0.1) -> M:
    """Soft movement pruning, in place: weights with scores below a threshold are zero, and a penalty lowers the scores.

    `W' = W * [sigmoid(S) > threshold]`, `dL/dS = dL/dW' * W` straight through, and `gate_penalty` is
    `sum sigmoid(S)`. The strength of the penalty sets the total sparsity; the sparsity of each layer is learned. S
    starts at 0. Data: training.

    threshold: in (0, 0.5), of the sigmoid.
    units: from `coupled_units`. Errors: RequestError for a threshold out of range.

    Use: movement pruning with a learned allocation over layers. Avoid: an exact sparsity: `top_movement_`.
    """
    if not 0 < threshold < 0.5:
        raise RequestError(f"threshold={threshold:g} is out of range", "0 < threshold < 0.5", "0.1 is usual")
    named = units.named(model)
    return attach_(model, {x.entity: [SoftlyMoved(named[x.entity].detach(), threshold)] for x in units.layers})
