"""Comparisons of latencies in interleaved rounds, with confidence intervals of the ratios."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from prunella.errors import RequestError
from prunella.measure.clock import now, since, thread_time
from prunella.measure.text import duration, interval, ratio, significant, table
from prunella.model.device import devices_of, on_accelerator, synchronize
from prunella.model.forward import forward
from prunella.model.state import mode

Run = Callable[[], object]
_Floats = np.ndarray[Any, np.dtype[np.float64]]
_SHORTEST = 2e-3
"""A sample lasts at least this many seconds; quicker functions are called several times a sample."""
_SLOW = 20e-3
"""Slower functions have no untimed call before a sample: the start-up is a small part of their time."""
_SAME = 1.25
"""An interval that contains 1 and extends beyond this ratio, up or down, is too wide to call two times equal."""


@dataclass(frozen=True)
class Ratio:
    """The speed-up of a candidate over the base, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def faster(self) -> bool:
        """Whether the whole interval is above 1, as it is shown with two digits."""
        return round(self.low, 2) > 1

    @property
    def slower(self) -> bool:
        """Whether the whole interval is below 1."""
        return round(self.high, 2) < 1

    @property
    def noisy(self) -> bool:
        """Whether the interval holds 1 and is too wide to say that both are the same."""
        return not self.faster and not self.slower and (self.low * _SAME < 1 or self.high > _SAME)

    @property
    def verdict(self) -> str:
        """One phrase that claims no more than the interval supports."""
        if self.faster:
            return f"{ratio(self.value)} faster {interval(self.low, self.high, '.2f')}"
        if self.slower:
            return f"{ratio(1 / self.value)} slower {interval(1 / self.high, 1 / self.low, '.2f')}"
        measured = f"({ratio(self.value)} {interval(self.low, self.high, '.2f')})"
        if self.noisy:
            return f"the measurement is too noisy to tell {measured}"
        return f"no speed-up on this device {measured}"


@dataclass(frozen=True)
class LatencySamples:
    """Seconds of one call: every sample of one candidate, in the order of the rounds."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, which one slow round does not move."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the samples is below the first, a quarter above the second."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Candidates measured in the same rounds; the first is the base of all ratios."""

    latencies: tuple[LatencySamples, ...]
    ratios: tuple[Ratio, ...]
    threads: int
    device: str
    rounds: int
    warmup: int
    seed: int

    @property
    def ratio(self) -> Ratio:
        """The second candidate against the first."""
        return self.ratios[0]

    def __str__(self) -> str:
        verdicts = ["", *(one.verdict for one in self.ratios)]
        rows = [(one.name, duration(one.median), said) for one, said in zip(self.latencies, verdicts, strict=True)]
        how = f"medians of {self.rounds} interleaved rounds, {self.threads} threads, {self.device}"
        return f"{table((), rows, right=(1,))}\n{how}"


@dataclass(frozen=True)
class Timing:
    """A smaller model against the dense one: milliseconds of both.

    low, high: a 95 % interval of `ratio`.  how: a description of the measurement.
    """

    dense: float
    small: float
    low: float
    high: float
    how: str

    @property
    def ratio(self) -> float:
        """The time of the smaller model as a fraction of the dense time."""
        return self.small / self.dense

    def __str__(self) -> str:
        shares = f"{significant(self.ratio, 3)} {interval(self.low, self.high, '.3g')} of the dense time"
        return f"{shares}, {duration(self.dense / 1e3)} -> {duration(self.small / 1e3)}, {self.how}"


def side_by_side(dense: nn.Module, small: nn.Module, inputs: Any, small_inputs: Any, *, seconds: float = 5.0) -> Timing:
    """Time one forward pass of both models in eval mode, in interleaved rounds, until the ratio is precise.

    Rounds are added until the 95 % interval of the median of `small / dense`, round by round, is within 2 % of it: a
    fraction of a second on a quiet machine. On a busy machine the measurement stops after `seconds`, with its present
    interval.
    """
    device = devices_of(dense, small)
    runs = {"dense": partial(forward, dense, inputs), "small": partial(forward, small, small_inputs)}
    base, other, threads = list[float](), list[float](), 1
    with mode(dense, training=False), mode(small, training=False), torch.no_grad():
        start = now()
        while True:
            comparison = compare_latency(runs, rounds=15, warmup=1, device=device, seed=len(base))
            base += comparison.latencies[0].samples
            other += comparison.latencies[1].samples
            threads = comparison.threads
            low, middle, high = _share(base, other)
            if high - low <= 0.04 * middle or since(start) > seconds:
                break
    how = f"median of {len(base)} interleaved rounds, {threads} thread{'s' * (threads > 1)}, {device}"
    milliseconds = statistics.median(base) * 1e3
    return Timing(milliseconds, milliseconds * middle, low, high, how)


def _share(base: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The median of `other / base` between the ends of its 95 % bootstrap interval.

    Of pairs of neighbors, not of medians: what slows a part of the rounds slows both of a pair.
    """
    shares = np.asarray(other) / np.asarray(base)
    low, high = _interval(np.median, shares, resamples=1000, seed=0)
    return low, float(np.median(shares)), high


def compare_latency(
    candidates: Mapping[str, Run],
    *,
    rounds: int = 40,
    warmup: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    clock: Callable[[], float] = now,
    before: Callable[[str], object] | None = None,
) -> Comparison:
    """Time several functions in interleaved rounds, each round in a new random order.

    Changes of the machine (clock, caches, other programs) then affect all candidates alike. One untimed call precedes
    each sample of a fast function, since other candidates may have evicted its code from the caches: on a busy machine
    this took longer than a small layer. The ratio is of medians, its interval the 2.5 and 97.5 percentiles of a
    bootstrap over rounds.
    rounds: at least 5; fewer give no useful interval. threads: of torch, during the measurement.
    device: all of them, as `devices_of` lists them; they are synchronized before each reading of the clock.
    clock: seconds; `own_clock()` excludes the time of other programs if one thread does all the work.
    before: called untimed with the name of a candidate before each of its calls; a sample is then one call.
    """
    if rounds < 5 or len(candidates) < 2 or warmup < 0:
        why = f"got {rounds} rounds, {len(candidates)} candidates, {warmup} warm-up calls"
        raise RequestError(
            "a comparison needs at least 5 rounds of at least 2 candidates", why, "for example rounds=40"
        )
    former_threads = torch.get_num_threads()
    torch.set_num_threads(threads or former_threads)
    try:
        samples = _measure(
            candidates,
            rounds,
            warmup,
            partial(_sample, device=device, clock=clock),
            random.Random(seed),
            before,
        )
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(former_threads)
    latencies = tuple(LatencySamples(name, tuple(times)) for name, times in samples.items())
    ratios = tuple(paired_ratio(latencies[0].samples, other.samples, seed=seed) for other in latencies[1:])
    return Comparison(latencies, ratios, used, device, rounds, warmup, seed)


def own_clock(device: str = "cpu") -> Callable[[], float]:
    """Processor time of this thread if torch has one thread, so that a busy machine does not decide; else wall time.

    An accelerator takes no time of the thread: there it is always wall time.
    """
    return thread_time if torch.get_num_threads() == 1 and not on_accelerator(device) else now


def paired_ratio(base: Sequence[float], other: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """`median(base) / median(other)` and its 95 % bootstrap interval (Efron 1979).

    Whole rounds are drawn, both samples of a round together, so what slowed both in a round cancels.
    """
    if len(base) != len(other) or not base or min(*base, *other) <= 0:
        raise RequestError("a paired ratio needs as many positive samples of both", f"got {len(base)} and {len(other)}")
    first, second = np.asarray(base, float), np.asarray(other, float)
    low, high = _interval(_ratio_of_medians, first, second, resamples=resamples, seed=seed)
    return Ratio(float(_ratio_of_medians(first, second)), low, high)


def _ratio_of_medians(first: _Floats, second: _Floats, axis: int = -1) -> _Floats:
    return np.asarray(np.median(first, axis=axis) / np.median(second, axis=axis))


def _interval(statistic: Callable[..., Any], *samples: _Floats, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a bootstrap over rounds, whole rounds drawn; a single round has no spread."""
    if len(samples[0]) == 1:
        value = float(statistic(*samples))
        return value, value
    from scipy.stats import bootstrap

    bounds = bootstrap(
        samples, statistic, n_resamples=resamples, paired=len(samples) > 1, vectorized=True, axis=-1,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(bounds.low), float(bounds.high)


_Sample = Callable[[Run, int, bool], float]


def _measure(
    candidates: Mapping[str, Run],
    rounds: int,
    warmup: int,
    sample: _Sample,
    order: random.Random,
    before: Callable[[str], object] | None,
) -> dict[str, list[float]]:
    for run in candidates.values():
        for _ in range(warmup):
            run()
    calls = {name: _calls(run, sample) if before is None else (1, False) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            if before is not None:
                before(name)
            samples[name].append(sample(candidates[name], *calls[name]))
    return samples


def _calls(run: Run, sample: _Sample) -> tuple[int, bool]:
    """How many calls make a sample long enough for the clock, and whether one goes ahead of it."""
    once = sample(run, 1, True)
    return max(1, round(_SHORTEST / max(once, 1e-7))), once < _SLOW


def _sample(run: Run, calls: int, ahead: bool, device: str, clock: Callable[[], float]) -> float:
    if ahead:
        run()
    synchronize(device)
    start = clock()
    for _ in range(calls):
        run()
    synchronize(device)
    return max(clock() - start, 1e-9) / calls
