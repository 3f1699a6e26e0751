"""Movement pruning: weights that training moves toward zero go, whatever their size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.schedules import Schedule, cubic
from prunella.selection import keep_top
from prunella.train.gates.gate import Gate, M, Scheduled, attach_
from prunella.train.penalty.units import Coupled
from prunella.types import Mask


class _StraightThrough(torch.autograd.Function):
    """`W * mask`; the scores get the gradient as if they were the mask."""

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
    made: Tensor = _StraightThrough.apply(weight, scores, mask.to(weight))  # type: ignore[no-untyped-call]
    return made


class Moved(Gate, Scheduled):
    """Keeps the highest scores, fewer as the schedule runs."""

    def __init__(self, weight: Tensor, sparsity: float, schedule: Schedule) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.sparsity, self.schedule, self.progress = sparsity, schedule, 0.0

    def advance(self, progress: float) -> None:
        """How far training is."""
        self.progress = progress

    def mask(self) -> Mask:
        """Exactly `round(sparsity * schedule(progress) * N)` are not kept."""
        count = self.scores.numel()
        gone = round(self.sparsity * self.schedule(self.progress) * count)
        return keep_top(self.scores.detach().flatten(), count - gone).view_as(self.scores)

    def cost(self, weight: Tensor) -> Tensor:
        """Nothing: the schedule decides how many go."""
        return self.scores.new_zeros(())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under the mask."""
        return masked(weight, self.scores, self.mask())


class SoftlyMoved(Gate):
    """Keeps scores above a threshold."""

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
def top_movement_(model: M, units: Coupled, *, sparsity: float, schedule: Schedule = cubic) -> M:
    """Movement pruning, in place: scores on every weight learn which ones training moves away from zero.

    `W' = W * mask`, the mask keeps the highest scores S of each layer, and `dL/dS = dL/dW' * W` straight through, so
    that gradient descent gives `S = -eta sum (dL/dW') W`: weights that shrink score below zero. Data: training.
    At progress t exactly `round(sparsity * schedule(t) * N)` weights of each layer are zero: call `advance_` after each
    step, at the end `bake_`. A pruned weight stands still while its score goes on, so that it may come back.

    sparsity: in [0, 1), of each layer. schedule: progress in [0, 1] -> part of it.

    Use: fine-tuning a pretrained model on a small task, at high sparsity. Avoid: training from scratch.
    """
    if not 0 <= sparsity < 1:
        raise RequestError(f"sparsity={sparsity:g} is out of range", "0 <= sparsity < 1", "0.9 removes 90 %")
    named = units.named(model)
    return attach_(model, {x.entity: [Moved(named[x.entity].detach(), sparsity, schedule)] for x in units.layers})


@training(source="Sanh et al. 2020, arXiv:2005.07683 (soft movement)")
def soft_movement_(model: M, units: Coupled, *, threshold: float = 0.1) -> M:
    """Soft movement pruning, in place: scores below a threshold close, and a penalty on the scores decides how many.

    `W' = W * [sigmoid(S) > threshold]`, `dL/dS = dL/dW' * W` straight through, and `gate_penalty` is
    `sum sigmoid(S)`, whose strength sets the sparsity, each layer finding its own. S starts at 0. Data: training.

    threshold: in (0, 0.5), of the sigmoid.

    Use: movement pruning that shares the budget among layers by itself. Avoid: an exact sparsity: use `top_movement_`.
    """
    if not 0 < threshold < 0.5:
        raise RequestError(f"threshold={threshold:g} is out of range", "0 < threshold < 0.5", "0.1 is usual")
    named = units.named(model)
    return attach_(model, {x.entity: [SoftlyMoved(named[x.entity].detach(), threshold)] for x in units.layers})
