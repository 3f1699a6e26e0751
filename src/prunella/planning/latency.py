"""Latency search: smaller models are built and timed against the dense one until one meets a `Latency`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, TargetMissed
from prunella.graph.cut.changes import changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Graph
from prunella.graph.solve.tokens import known_only, renumber
from prunella.measure.timing import Timing, side_by_side
from prunella.model.copying import copied
from prunella.model.forward import forward
from prunella.planning.budget import Ladder, removed
from prunella.selection import Counts
from prunella.targets import TOLERANCE, Latency
from prunella.types import Keep

MOST = 16
"""Most measurements of one search; a binary search of 4096 widths takes 12."""
Widths = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LatencyProbe:
    """Measures pruned models. known: latest timing of each set of widths. taken: all timings."""

    model: nn.Module
    graph: Graph
    inputs: Any
    known: dict[Widths, Timing] = field(default_factory=dict)
    taken: list[Timing] = field(default_factory=list)

    def time(self, target: Latency, keep: Keep, *, again: bool = False) -> Timing:
        """The timing of the model with `keep` against the dense one, by widths alone. again: measure once more."""
        widths = tuple(sorted((name, int(mask.sum())) for name, mask in keep.items()))
        if again or widths not in self.known:
            small, example = self._small(keep)
            self.known[widths] = (target.measure or side_by_side)(self.model, small, self.inputs, example)
            self.taken.append(self.known[widths])
        return self.known[widths]

    def measured(self, target: Latency, keep: Keep) -> tuple[Timing, str]:
        """The timing of the pruned model, and a line for the plan."""
        timing = self.time(target, keep)
        asked = target.value if target.value <= 1 else target.value / timing.dense
        below = "; the time jumps over the target" if timing.ratio < asked * (1 - TOLERANCE) else ""
        return timing, f"measured: {timing}; {len(self.taken)} measurements in all{below}"

    def _small(self, keep: Keep) -> tuple[nn.Module, Any]:
        small, done = copied(self.model), changes(self.graph, keep)
        try:
            change_(small, done)
            example = renumber(known_only(self.inputs, done.renumbered), done.renumbered)
            with torch.no_grad():
                forward(small, example)
        except Exception as error:
            why = f"the smaller model does not run: {type(error).__name__}: {error}"
            raise NotSupported("the latency cannot be measured", why, "ask for MACs") from error
        return small, example


def in_order(ladders: Sequence[Ladder]) -> tuple[Tensor, Tensor]:
    """The ladder and the key of every step, in the order of removal. Equal keys: the last ladder first."""
    keys = torch.cat([entry.keys for entry in reversed(ladders)])
    owner = torch.cat([torch.full((len(ladders[i].keys),), i, device="cpu") for i in reversed(range(len(ladders)))])
    order = keys.argsort(stable=True)
    return owner[order], keys[order]


def search_latency(
    ladders: Sequence[Ladder],
    time: Callable[[Counts, bool], Timing],
    cost: Callable[[Counts], float],
    target: Latency,
    *,
    equal_widths: bool = False,
) -> Counts:
    """Units to remove from every pool so that the pruned model meets the target, measured by `time(counts, again)`.

    Each step measures one point of the order of removal. The point lies between the slowest one that meets the target
    and the fastest one that misses it, where a straight line in `cost` (multiply-adds) predicts the target. A point
    that meets it is measured once more, since the best of several noisy numbers is too optimistic. The second number
    decides; if it misses, the search continues. If the time jumps over the target, the point after the jump is taken.

    Errors: TargetMissed if the target is the dense time or more, or if removing all prunable units is not enough.
    """
    owner, keys = in_order(ladders)
    stops = [p for p in range(len(owner) + 1) if not equal_widths or p in (0, len(owner)) or keys[p] > keys[p - 1]]

    def counts(stop: int) -> Counts:
        return removed(ladders, tuple(torch.bincount(owner[: stops[stop]], minlength=len(ladders)).tolist()))

    last = len(stops) - 1
    full = time(counts(last), False)
    wanted_ratio = target.value if target.value <= 1 else target.value / full.dense
    if wanted_ratio >= 1:
        raise TargetMissed(
            f"{target} would remove nothing", f"the dense model takes {full.dense:.3g} ms", "ask for less"
        )
    ratios, confirmed = {0: 1.0, last: full.ratio}, set[int]()
    limit = wanted_ratio * (1 + TOLERANCE)
    for _ in range(MOST):
        quick = [stop for stop, ratio in ratios.items() if ratio <= limit and stop]
        if not quick:
            break
        near = min(
            filter(None, ratios), key=lambda stop: (abs(ratios[stop] - wanted_ratio), stop)
        )  # 0 is the dense model
        hit = abs(ratios[near] - wanted_ratio) <= TOLERANCE * wanted_ratio
        high = near if hit else min(quick)
        low = max(stop for stop in ratios if stop < high)
        if hit or high - low == 1:
            if high in confirmed:
                break
            ratios[high] = time(counts(high), True).ratio
            confirmed.add(high)
        else:
            stop = _between(low, high, ratios, wanted_ratio, lambda stop: cost(counts(stop)))
            ratios[stop] = time(counts(stop), False).ratio
    quick = [stop for stop, ratio in ratios.items() if ratio <= limit and stop]
    if not quick:
        raise _missed(target, wanted_ratio, time(counts(last), False))
    return counts(min(quick, key=lambda stop: (abs(ratios[stop] - wanted_ratio), stop)))


def _between(low: int, high: int, ratios: dict[int, float], asked: float, cost: Callable[[int], float]) -> int:
    """The stop between two where the line through both predicts the target ratio, away from the ends."""
    drop = ratios[low] - ratios[high]
    part = min(0.85, max(0.15, (ratios[low] - asked) / drop)) if drop > 0 else 0.5
    goal = cost(low) + part * (cost(high) - cost(low))
    first, last = low + 1, high - 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if cost(middle) <= goal else (middle + 1, last)
    return first


def _missed(target: Latency, asked: float, full: Timing) -> TargetMissed:
    none = "; pruning gives no speed-up here" if full.high >= 1 else ""
    return TargetMissed(
        f"{target} cannot be met: without all prunable units, {full.ratio:.3g} of the dense time remains{none}",
        f"asked {asked:.3g}; measured {full}",
        "ask for more time, lower min_density=, skip less, or take larger inputs: small ones are bound by overhead",
    )
