"""Rules of dynamic sparse training: which weights are dropped, which weights grow, and how many.

`prunella.train.DropGrow` carries a rule out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prunella.criteria import magnitude, random
from prunella.errors import RequestError
from prunella.planning.scoring import Criterion
from prunella.registry.controlled import name_of
from prunella.registry.method import metric, needs_of, training
from prunella.schedules import Schedule, cubic
from prunella.targets import Sparsity
from prunella.types import Grad, Mask, Saliency

KNOWN = ("weight", "grad", "noise")
"""Statistics for drop and grow: the weight, its dense gradient (averaged if the rule has a memory), uniform noise."""
Fraction = Callable[[float], float]
"""Progress in [0, 1] -> fraction of the active weights that an update exchanges."""


def dense_gradient(grad: Grad) -> Saliency:
    """`|g|` of every weight, active or not: how fast the loss falls if it grows."""
    return grad.abs()


def cosine_fraction(alpha: float) -> Fraction:
    """`f(p) = alpha / 2 * (1 + cos(pi p))`: for alpha = 0.3 it is 0.3, 0.2561, 0.15, 0.0439 and 0 at the quarters."""
    _check_part(alpha, "alpha")
    return lambda progress: alpha / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Rule:
    """The change of the mask in an update.

    fraction: progress -> fraction of a layer's active weights that is exchanged; at least one weight unless it is 0.
    drop, grow: criteria of `weight`, `grad` and `noise`; the lowest scores are dropped, the highest scores grow. trade:
    True divides growth among all layers by the mean gradient of their active weights; False grows in each layer as
    many weights as it dropped. memory: in [0, 1), averages the dense gradient at every step,
    `m <- memory m + (1 - memory) g`; 0 takes the gradient of the update's step alone. final: sparsity at the end, which
    magnitude pruning reaches along `schedule`; None keeps the number of active weights.
    """

    fraction: Fraction
    drop: Criterion = magnitude
    grow: Criterion = random
    trade: bool = False
    memory: float = 0.0
    final: Sparsity | None = None
    schedule: Schedule = cubic

    def __post_init__(self) -> None:
        for role, function in (("drop", self.drop), ("grow", self.grow)):
            unknown = [need for need in needs_of(function) if need not in KNOWN]
            if unknown:
                why = f"training provides {', '.join(KNOWN)}"
                raise RequestError(f"{role}={name_of(function)} needs `{unknown[0]}`", why, "take magnitude or random")
        if not 0 <= self.memory < 1:
            raise RequestError(f"memory={self.memory:g} is out of range", "it is in [0, 1)", "for example memory=0.9")

    @property
    def needs_gradient(self) -> bool:
        """Whether dense gradients are read: at every step if the rule has a memory, else at updates only."""
        return self.trade or self.memory > 0 or "grad" in {*needs_of(self.drop), *needs_of(self.grow)}


@training(source="Mocanu et al. 2018, arXiv:1707.04780", status="stable")
def set_(*, zeta: float = 0.3) -> Rule:
    """Drop the smallest weights of each layer and grow as many at random positions of the same layer.

    `zeta * n_l` of the `n_l` active weights are exchanged at every update; no gradient of inactive weights is needed.
    Data: the training data. zeta: in [0, 1].

    Example:

        >>> import prunella as pr
        >>> rule = pr.train.set_(zeta=0.3)
        >>> round(rule.fraction(0.5), 3)
        0.3

    Use: hardware that never sees a dense gradient; long runs with many updates. Avoid: short runs at high sparsity:
    `rigl` finds better positions.
    """
    _check_part(zeta, "zeta")
    return Rule(lambda progress: zeta)


@training(source="Evci et al. 2020, arXiv:1911.11134", status="stable")
def rigl(*, alpha: float = 0.3) -> Rule:
    """Drop the smallest weights of each layer and grow where the dense gradient is largest.

    `f(t) = alpha / 2 * (1 + cos(pi t / T_end))` of the active weights are exchanged. The dense gradient is read at
    updates only: training costs `rigl_flops`. Data: the training data. alpha: in [0, 1], the fraction at step 0.

    Example:

        >>> import prunella as pr
        >>> rule = pr.train.rigl(alpha=0.3)
        >>> round(rule.fraction(0.5), 3)
        0.15

    Use: training at 80 to 99 % sparsity from the start; masks by `erk`, updates every 100 steps or so until three
    quarters of the run. Avoid: small batches with a noisy gradient: update less often.
    """
    return Rule(cosine_fraction(alpha), grow=dense_gradient)


@training(source="Dettmers and Zettlemoyer 2019, arXiv:1907.04840", status="stable")
def sparse_momentum(*, alpha: float = 0.5, memory: float = 0.9) -> Rule:
    """Drop the smallest weights of each layer and grow weights in the layers and positions of largest momentum.

    Layer `l` grows a share of all dropped weights in proportion to `mean |m| over its active weights`, with `m` the
    averaged dense gradient. A share that exceeds a layer goes to the other layers. The total stays exact, and no layer
    passes density 1. Data: the training data. alpha: fraction exchanged at the first step, falling to 0 by a half
    cosine. memory: in (0, 1).
    Errors: RequestError for numbers out of range.

    Example:

        >>> import prunella as pr
        >>> rule = pr.train.sparse_momentum(alpha=0.3)
        >>> round(rule.fraction(0.5), 3)
        0.15

    Use: when the right density of each layer is unknown. Avoid: tight memory or time: the dense gradient is averaged at
    every step.
    """
    if not 0 < memory < 1:
        raise RequestError(f"memory={memory:g} is out of range", "it is in (0, 1)", "for example memory=0.9")
    return Rule(cosine_fraction(alpha), grow=dense_gradient, trade=True, memory=memory)


@training(source="Liu et al. 2021, arXiv:2106.10404", status="stable")
def granet(*, final: float = 0.9, alpha: float = 0.5, schedule: Schedule = cubic) -> Rule:
    """Prune by magnitude along a cubic curve, and exchange weights at every update.

    `s_t = s_f + (s_i - s_f)(1 - t/T)^3` by magnitude over all layers, exact to the weight; then the fraction `alpha / 2
    * (1 + cos(pi t / T))` of the remaining weights of each layer is exchanged for the positions of largest gradient.
    Data: the training data. final: sparsity at the end, in (0, 1). alpha: in [0, 1]. schedule: another curve.

    Start dense, or at half density, and name the weights by `DropGrow(..., layers=["*.weight"])`: a layer without a
    mask that no pattern names stays dense.
    Errors: RequestError for numbers out of range.

    Example:

        >>> import prunella as pr
        >>> rule = pr.train.granet(alpha=0.3)
        >>> round(rule.fraction(0.5), 3)
        0.15

    Use: the best accuracy at a sparsity when early steps may be denser. Avoid: a fixed memory budget from the first
    step: take `rigl`.
    """
    if not 0 < final < 1:
        raise RequestError(f"final={final:g} is out of range", "it is in (0, 1)", "for example final=0.9")
    return Rule(cosine_fraction(alpha), grow=dense_gradient, final=Sparsity(final), schedule=schedule)


@metric(source="Liu et al. 2021, arXiv:2102.02887")
def itop(masks: Iterable[Mapping[str, Mask]]) -> float:
    """In-time over-parameterization: the fraction of all weights that was active at some time.

    `R_s = |union of masks| / N` in (0, 1], over the masks (by name) of all updates so far; `R_s` never falls.
    `DropGrow.explored` is the same number, updated during training.
    Errors: RequestError without masks.

    Example:

        >>> import torch, prunella as pr
        >>> first = {"0": torch.tensor([True, False, False, True])}
        >>> second = {"0": torch.tensor([True, True, False, False])}
        >>> pr.train.itop([first, second])
        0.75

    Use: checking that dynamic training explores enough; near 1 it may match a dense run. Avoid: static masks, where
    `R_s` is the density.
    """
    union: dict[str, Mask] = {}
    for named_masks in masks:
        for name, mask in named_masks.items():
            union[name] = union[name] | mask if name in union else mask.clone()
    total = sum(mask.numel() for mask in union.values())
    if not total:
        raise RequestError("there are no masks", "", "pass masks_of(model) after every update")
    return sum(int(mask.sum()) for mask in union.values()) / total


def rigl_flops(sparse: float, dense: float, every: int) -> float:
    """Training cost of one sample and step: `(3 f_S dT + 2 f_S + f_D) / (dT + 1)`.

    sparse, dense: cost of one forward pass with the mask and without. every: steps between updates.

    Example:

        >>> import prunella as pr
        >>> round(pr.train.rigl_flops(sparse=0.1, dense=1.0, every=100), 3)
        0.309
    """
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


def _check_part(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise RequestError(f"{name}={value:g} is out of range", "it is in [0, 1]", f"for example {name}=0.3")
