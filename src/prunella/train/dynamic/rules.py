"""Rules of dynamic sparse training: what is dropped, what grows, how many; the papers are rules of a few words.

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
"""What drop and grow may ask for: the weight, its dense gradient (averaged if the rule has a memory), uniform noise."""
Fraction = Callable[[float], float]
"""Progress in [0, 1] -> part of the active weights that an update exchanges."""


def dense_gradient(grad: Grad) -> Saliency:
    """`|g|` of every weight, active or not: how fast the loss falls if it grows."""
    return grad.abs()


def cosine_fraction(alpha: float) -> Fraction:
    """`f(p) = alpha / 2 * (1 + cos(pi p))`: for alpha = 0.3 it is 0.3, 0.2561, 0.15, 0.0439 and 0 at the quarters."""
    _check_part(alpha, "alpha")
    return lambda progress: alpha / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Rule:
    """How an update moves the mask.

    fraction: progress -> part of a layer's active weights that is exchanged, one at least unless it is 0. drop, grow:
    criteria of `weight`, `grad` and `noise`; the lowest are dropped, the highest grow. trade: dropped weights grow
    where the mean gradient of active weights is largest, in any layer; else in their own. memory: in [0, 1), averaging
    `m <- memory m + (1 - memory) g` of the dense gradient at every step, 0 for the gradient of the update's step alone.
    final: sparsity at the end, where the whole gets sparser by magnitude along `schedule`; None keeps the number.
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
                why = f"while training there are {', '.join(KNOWN)}"
                raise RequestError(
                    f"{role}={name_of(function)} asks for `{unknown[0]}`", why, "take magnitude or random"
                )
        if not 0 <= self.memory < 1:
            raise RequestError(f"memory={self.memory:g} is out of range", "it is in [0, 1)", "for example memory=0.9")

    @property
    def needs_gradient(self) -> bool:
        """Whether dense gradients are read, and then at updates only unless there is a memory."""
        return self.trade or self.memory > 0 or "grad" in {*needs_of(self.drop), *needs_of(self.grow)}


@training(source="Mocanu et al. 2018, arXiv:1707.04780", status="stable")
def set_(*, zeta: float = 0.3) -> Rule:
    """Drop the smallest weights of each layer and grow as many at random places of it.

    `zeta * n_l` of the `n_l` active weights are exchanged at every update; no gradient of inactive weights is needed.
    Data: what you train on. zeta: in [0, 1].

    Use: hardware that never sees a dense gradient; long runs with many updates. Avoid: short runs at high sparsity:
    `rigl` finds better places.
    """
    _check_part(zeta, "zeta")
    return Rule(lambda progress: zeta)


@training(source="Evci et al. 2020, arXiv:1911.11134", status="stable")
def rigl(*, alpha: float = 0.3) -> Rule:
    """Drop the smallest weights of each layer and grow where the dense gradient is largest.

    `f(t) = alpha / 2 * (1 + cos(pi t / T_end))` of the active weights are exchanged. The dense gradient is read at
    updates only: training costs `rigl_flops`. Data: what you train on. alpha: in [0, 1], the part at the first step.

    Use: training at 80 to 99 % sparsity from the start; masks by `erk`, updates every 100 steps or so until three
    quarters of the run. Avoid: batches so small that the gradient of a step says little: update more seldom.
    """
    return Rule(cosine_fraction(alpha), grow=dense_gradient)


@training(source="Dettmers and Zettlemoyer 2019, arXiv:1907.04840", status="stable")
def sparse_momentum(*, alpha: float = 0.5, memory: float = 0.9) -> Rule:
    """Drop the smallest weights everywhere and grow them in the layers, and at the places, where momentum is largest.

    Layer `l` gets the share `mean |m| over its active weights` of all that was dropped, `m` the average of dense
    gradients; what does not fit goes to the others. The total stays exact, and no layer passes density 1. Data: what
    you train on. alpha: part exchanged at the first step, falling to 0 by a half cosine. memory: in (0, 1).

    Use: when it is not known how dense each layer should be. Avoid: tight memory or time: the dense gradient is
    averaged at every step.
    """
    if not 0 < memory < 1:
        raise RequestError(f"memory={memory:g} is out of range", "it is in (0, 1)", "for example memory=0.9")
    return Rule(cosine_fraction(alpha), grow=dense_gradient, trade=True, memory=memory)


@training(source="Liu et al. 2021, arXiv:2106.10404", status="stable")
def granet(*, final: float = 0.9, alpha: float = 0.5, schedule: Schedule = cubic) -> Rule:
    """Get sparser along a cubic curve, and at every update grow as many as are dropped beyond it.

    `s_t = s_f + (s_i - s_f)(1 - t/T)^3` by magnitude over all layers, met to the weight; then the part `alpha / 2 *
    (1 + cos(pi t / T))` of what is left in each layer is exchanged for the places of largest gradient. Data: what you
    train on. final: sparsity at the end, in (0, 1). alpha: in [0, 1]. schedule: another curve.

    Start dense, or at half density, and name the weights by `DropGrow(..., layers=["*.weight"])`: a layer that carries
    no mask and is not named stays dense.

    Use: the best accuracy at a sparsity when early steps may be denser. Avoid: a fixed memory budget from the first
    step: take `rigl`.
    """
    if not 0 < final < 1:
        raise RequestError(f"final={final:g} is out of range", "it is in (0, 1)", "for example final=0.9")
    return Rule(cosine_fraction(alpha), grow=dense_gradient, final=Sparsity(final), schedule=schedule)


@metric(source="Liu et al. 2021, arXiv:2102.02887")
def itop(masks: Iterable[Mapping[str, Mask]]) -> float:
    """In-time over-parameterisation: the part of all weights that was active at some time.

    `R_s = |union of masks| / N` in (0, 1], for masks by name, of all updates so far; it never falls.
    `DropGrow.explored` is the same number, kept up to date while training.

    Use: telling whether dynamic training explores enough; near 1 it may match a dense run. Avoid: static masks, where
    it is the density.
    """
    union: dict[str, Mask] = {}
    for one in masks:
        for name, mask in one.items():
            union[name] = union[name] | mask if name in union else mask.clone()
    total = sum(mask.numel() for mask in union.values())
    if not total:
        raise RequestError("there are no masks", "", "pass masks_of(model) after every update")
    return sum(int(mask.sum()) for mask in union.values()) / total


def rigl_flops(sparse: float, dense: float, every: int) -> float:
    """Training cost of one sample and step: `(3 f_S dT + 2 f_S + f_D) / (dT + 1)`.

    sparse, dense: cost of one forward pass with the mask and without. every: steps between updates.
    """
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


def _check_part(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise RequestError(f"{name}={value:g} is out of range", "it is in [0, 1]", f"for example {name}=0.3")
