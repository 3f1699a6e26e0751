"""When to prune: functions from progress in [0, 1] to the fraction in [0, 1] of the final target.

Progress is `step / steps`. Every schedule runs from exactly 0 to exactly 1 and never falls. A cycle (`acdc`) has the
same ends but falls in between, so that weights come back. At a final sparsity `s` the sparsity is
`s * schedule(progress)`. `prunella.Pruner` does the same for budgets of parameters, MACs and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from prunella.errors import RequestError, suggesting
from prunella.registry.method import cycle, schedule
from prunella.targets import Sparsity

Schedule = Callable[[float], float]


def _checked(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise RequestError(f"progress {progress:g} is out of range", "a schedule takes a number from 0 to 1", "")
    return progress


@schedule(source="LeCun et al. 1990, Optimal Brain Damage; the usual setting after training")
def single_step(progress: float) -> float:
    """The full target at the first update: one-shot pruning.

    `f(p) = 1 for p > 0, else 0`.

    Example:

        >>> import prunella as pr
        >>> pr.schedules.single_step(0.0), pr.schedules.single_step(0.01)
        (0.0, 1.0)

    Use: pruning after training with one recovery at the end. Avoid: more than about 80 % without distillation.
    """
    return float(_checked(progress) > 0)


@schedule(source="Han et al. 2015, arXiv:1506.02626 (prune in equal steps)")
def linear(progress: float) -> float:
    """An equal step at every update.

    `f(p) = p`.

    Example:

        >>> import prunella as pr
        >>> [round(pr.schedules.linear(k / 4), 3) for k in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]

    Use: a plain reference for other schedules. Avoid: high sparsity, where the last steps hurt most.
    """
    return _checked(progress)


@schedule(source="Zhu and Gupta 2017, arXiv:1710.01878")
def cubic(progress: float) -> float:
    """Large steps at the start, small steps at the end (AGP).

    `f(p) = 1 - (1 - p)^3`. At a final sparsity of 0.9 the sparsity is 0.2439, 0.5203, 0.7875, 0.8859 and 0.9 at
    p = 0.1, 0.25, 0.5, 0.75 and 1.

    Example:

        >>> import prunella as pr
        >>> [round(pr.schedules.cubic(k / 4), 3) for k in range(5)]
        [0.0, 0.578, 0.875, 0.984, 1.0]

    Use: pruning during training; the usual choice. Avoid: runs that start from random weights, where early scores are
    not informative.
    """
    return 1 - (1 - _checked(progress)) ** 3


@schedule(source="Loshchilov and Hutter 2017, arXiv:1608.03983 (the curve, there for the learning rate)")
def cosine(progress: float) -> float:
    """Small steps at both ends.

    `f(p) = (1 - cos(pi p)) / 2`.

    Example:

        >>> import prunella as pr
        >>> [round(pr.schedules.cosine(k / 4), 3) for k in range(5)]
        [0.0, 0.146, 0.5, 0.854, 1.0]

    Use: a gentle start and end. Avoid: short runs, whose first tenth removes almost nothing.
    """
    return (1 - math.cos(math.pi * _checked(progress))) / 2


@schedule(source="Tanaka et al. 2020, arXiv:2006.05467")
def exponential(progress: float, *, rho: float = 100.0) -> float:
    """Remove the same fraction of the survivors at every update (SynFlow).

    `f(p) = (1 - rho^-p) / (1 - 1/rho)`: at a final density of `1 / rho` the density after update k of n is
    `rho^(-k/n)`, for rho = 100 and n = 5: 0.3981, 0.1585, 0.0631, 0.0251, 0.01.

    rho: compression ratio, above 1; the reciprocal of the final density gives SynFlow's own schedule.
    Errors: RequestError for rho of at most 1.

    Example:

        >>> import prunella as pr
        >>> [round(1 - 0.99 * pr.schedules.exponential(k / 5), 4) for k in range(1, 6)]
        [0.3981, 0.1585, 0.0631, 0.0251, 0.01]

    Use: a very small density in many rounds, as at initialization. Avoid: moderate sparsity, where `cubic` is as good
    and better known.
    """
    if rho <= 1:
        raise RequestError(f"rho={rho:g} is out of range", "rho is a compression ratio, above 1", "for example rho=100")
    if _checked(progress) == 1:
        return 1.0
    return float((1 - rho**-progress) / (1 - 1 / rho))


@cycle(source="Peste et al. 2021, arXiv:2106.12379")
def acdc(progress: float, *, cycles: int = 8, warmup: float = 0.1, last: float = 0.15) -> float:
    """Dense and sparse phases in turn (AC/DC). All weights train in a dense phase; the last phase is sparse.

    `f(p) = 0` for `p < warmup`, `1` for `p >= 1 - last`, and in between `2 * cycles` phases of equal length, `1` in the
    first, `0` in the second and so on. For a `Pruner` with `nested=False`: weights come back as zeros with an empty
    optimizer state. The start of each sparse phase makes a new plan for the full target.

    cycles: pairs of phases, at least 1. warmup, last: parts of the run, each above 0, together below 1.
    Errors: RequestError for knobs out of range.

    Example:

        >>> import prunella as pr
        >>> [pr.schedules.acdc(k / 10, cycles=2) for k in range(11)]
        [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]

    Use: training a sparse and a dense network from scratch in one run. Avoid: short runs and fine-tuning, where half of
    the steps train weights that are removed.
    """
    if cycles < 1 or warmup <= 0 or last <= 0 or warmup + last >= 1:
        what = f"cycles={cycles}, warmup={warmup:g}, last={last:g} are out of range"
        raise RequestError(what, "cycles >= 1, warmup > 0, last > 0, warmup + last < 1", "use the defaults of acdc")
    if _checked(progress) < warmup:
        return 0.0
    # Steps lie on the edges of phases: rounding of p must not decide the phase.
    phase = int((progress - warmup) / (1 - warmup - last) * 2 * cycles + 1e-9)
    return float(phase >= 2 * cycles or phase % 2 == 0)


def rounds(count: int, *, of_survivors: float | None = None, of_all: float | None = None) -> tuple[Sparsity, ...]:
    """Targets of `count` rounds. Each round removes the same fraction, of the survivors or of all weights.

    `of_survivors=p`: `1 - (1 - p)^k` after round k, the curve of `exponential(k / count, rho=(1 - p)^-count)`: LeNet's
    20 % a round leaves 80, 64, 51.2 % and so on. `of_all=p`: `k p`, the curve of `linear`. Exactly one of both.
    Errors: RequestError unless the numbers describe rounds.

    Example:

        >>> import prunella as pr
        >>> pr.schedules.rounds(2, of_survivors=0.5)
        (Sparsity(value=0.5, of='prunable'), Sparsity(value=0.75, of='prunable'))
    """
    if count < 1 or (of_survivors is None) == (of_all is None):
        what = f"count={count}, of_survivors={of_survivors}, of_all={of_all} do not describe rounds"
        raise RequestError(what, "count >= 1, and either of_survivors= or of_all=", "for example of_survivors=0.2")
    part = of_all if of_survivors is None else of_survivors
    assert part is not None
    if not 0 < part < 1 or (of_all is not None and of_all * count >= 1):
        why = f"{count} rounds of {part:g} keep no weight" if 0 < part < 1 else "a fraction is above 0 and below 1"
        raise RequestError(f"a fraction of {part:g} a round is out of range", why, "lower it, or use of_survivors=")
    removed = [1 - (1 - part) ** k if of_all is None else part * k for k in range(1, count + 1)]
    return tuple(map(Sparsity, removed))


__all__ = [
    "acdc",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "rounds",
    "single_step",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
