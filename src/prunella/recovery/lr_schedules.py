"""Learning-rate schedules for retraining: each is a value of `Training(lr_schedule=...)`.

The learning rate of retraining matters as much as the criterion. `finetune` therefore always returns its learning rates
as `LossCurve.lr`, the trace for the functions here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunella.errors import RequestError
from prunella.registry.method import recovery


@dataclass(frozen=True)
class RecordedLR:
    """Recorded learning rates, one for each step: pass as `lr_schedule` with `lr=1` and `steps=recorded.steps`.

    For the progress `(t + 1/2) / steps` of `finetune` the value is rate t exactly; over another number of steps the
    value is the rate of the nearest step. With another `lr` the rates are factors of `lr`.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rates or not all(0 <= rate < math.inf for rate in self.rates):
            raise RequestError(
                "these learning rates cannot be replayed",
                f"found {len(self.rates)} rates" + (", not all finite and from 0 up" if self.rates else ""),
                "pass the lr of a Curve that finetune returned",
            )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.rates)

    def __call__(self, progress: float) -> float:
        return self.rates[min(math.floor(progress * self.steps), self.steps - 1)]


def constant_lr(progress: float) -> float:
    """A constant learning rate: factor 1.

    Example:

        >>> import prunella as pr
        >>> pr.recovery.constant_lr(0.0), pr.recovery.constant_lr(1.0)
        (1.0, 1.0)
    """
    return 1.0


def linear_lr(progress: float) -> float:
    """Linear decay of the learning rate to 0: `1 - p`.

    Example:

        >>> import prunella as pr
        >>> [pr.recovery.linear_lr(k / 4) for k in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return 1 - progress


@recovery(source="Renda et al. 2020, arXiv:2003.02389 (learning-rate rewinding)")
def rewind_lr(trace: Sequence[float], *, steps: int) -> RecordedLR:
    """Retrain with the learning rates of the last steps of training, from the present weights.

    `lr'[t] = lr[T - steps + t]` for a recorded trace `lr` of T steps: the exact rates of training from step
    `T - steps` on.

    trace: `Curve.lr` of the training that made the model. steps: from 1 to T; more steps rewind further. Pass `lr=1` to
    `finetune`, since the rates are absolute.

    Data: none; the curve of an earlier training.
    Errors: RequestError for more steps than the trace has.

    Example:

        >>> import prunella as pr
        >>> pr.recovery.rewind_lr((0.4, 0.3, 0.2, 0.1), steps=2).rates
        (0.2, 0.1)

    Use: after one-shot or iterative pruning, with the trace of training: better than a small constant rate. Avoid:
    models without a trace, and a few steps at the low end of the trace, which are plain fine-tuning.
    """
    if not 1 <= steps <= len(trace):
        raise RequestError(
            f"cannot replay the last {steps} of {len(trace)} learning rates",
            "rewinding goes back to a step of the recorded training",
            f"steps from 1 to {len(trace)}",
        )
    return RecordedLR(tuple(trace[len(trace) - steps :]))


@recovery(source="Le and Hua 2021, arXiv:2105.03193 (scaled learning-rate restarting)")
def scaled_lr(trace: Sequence[float], *, steps: int, warmup: float = 0.1) -> RecordedLR:
    """Retrain with the whole learning-rate curve of training, compressed into fewer steps.

    `lr'[t] = lr[floor((t + 1/2) T / steps)] * min(1, (t + 1) / (warmup * steps))` for a trace `lr` of T steps.

    trace: `Curve.lr` of training. steps: above 0. warmup: fraction of the steps, from 0 to 1, in which the rate rises.
    Pass `lr=1` to `finetune`, since the rates are absolute.

    Data: none; the curve of an earlier training.
    Errors: RequestError for knobs out of range.

    Example:

        >>> import prunella as pr
        >>> pr.recovery.scaled_lr((0.4, 0.3, 0.2, 0.1), steps=2, warmup=0).rates
        (0.3, 0.1)

    Use: a budget much shorter than training, with large rates at the start. Avoid: a model that lost almost nothing:
    large rates harm it first.
    """
    if steps < 1 or not 0 <= warmup <= 1:
        raise RequestError(f"steps={steps}, warmup={warmup:g} is out of range", "steps from 1, warmup from 0 to 1")
    recorded = RecordedLR(tuple(trace))
    rise = max(warmup * steps, 1.0)
    return RecordedLR(tuple(recorded((t + 0.5) / steps) * min(1.0, (t + 1) / rise) for t in range(steps)))


@recovery(
    source="Zimmer et al. 2023, arXiv:2111.00843 (BIMP, ALLR); Li et al. 2020, arXiv:1905.04753 (linear, budgeted)"
)
def adaptive_lr(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, peak: float, sparsity: float, budget: float
) -> float:
    """The initial value of a linear learning-rate decay, by the pruned weights and the retraining budget (ALLR).

    `lr0 = peak * max(d1, d2)` with `d1 = |w - w'| / (sqrt(s) |w|)` over all weights together, at most 1, and `d2` the
    budget. Pass the value to `finetune` as `lr`, with `Training(lr_schedule=linear_lr)`: the rate ends at 0 after any
    number of steps.

    before, after: weights by name (`dict(model.named_parameters())`) of the same shapes, before and after pruning.
    peak: largest learning rate of training. sparsity: the fraction s that this pruning removed, in (0, 1].
    budget: retraining steps divided by training steps, above 0; values above 1 count as 1.

    Data: none.
    Errors: RequestError for numbers out of range, or weights that do not match.

    Use: iterative pruning with a short budget in every round. Avoid: a budget for which a learning rate was tuned.
    """
    if not (0 < sparsity <= 1 and budget > 0 and 0 < peak < math.inf):
        raise RequestError(
            f"peak={peak:g}, sparsity={sparsity:g}, budget={budget:g} is out of range",
            "peak and budget are above 0, sparsity in (0, 1]",
        )
    unmatched = [name for name in before if name not in after or after[name].shape != before[name].shape]
    if unmatched or not before:
        raise RequestError(
            f"cannot compare {unmatched[0] if unmatched else 'no weights'} before and after",
            "the weights must have the same names and shapes",
            "pass copies of the weights of a masked model",
        )
    moved = sum(float((before[name].detach() - after[name].detach()).double().square().sum()) for name in before)
    size = sum(float(value.detach().double().square().sum()) for value in before.values())
    drop = math.sqrt(moved / (sparsity * size)) if size else 0.0
    return peak * min(1.0, max(drop, budget))
