"""The widths of `prune`: a knapsack over the losses of each group, finer steps, and the search for a latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from prunella.app.prune_groups import Scope, over, reachable
from prunella.errors import TargetMissed
from prunella.planning.candidates import CandidateUnits
from prunella.planning.recipe import Recipe
from prunella.planning.request import Request
from prunella.search.knapsack import knapsack
from prunella.search.scan import Scan
from prunella.search.space import Space
from prunella.selection import Counts
from prunella.stats import Source
from prunella.targets import Latency, MACs, Params, Target
from prunella.types import Inputs

OPTIONS, TRIALS = 32, 6
"""Most widths of a group in the knapsack; most measurements of a latency."""
UNUSED = 0.03
"""Share of the budget that widths for hardware may leave unused."""


@dataclass(frozen=True)
class WidthChoice:
    """The smallest sum of losses that meets all targets. losses: of each group, by the number of removed units."""

    request: Request
    scope: Scope
    candidates: CandidateUnits
    losses: Sequence[Mapping[int, float]]
    targets: tuple[Target, ...]
    inputs: Inputs

    @cached_property
    def levels(self) -> list[list[int]]:
        """The steps of each group."""
        return [self.scope.levels(index) for index in range(len(self.scope.groups))]

    def counts(self, targets: Sequence[Target]) -> Counts:
        """Units removed from each group, by a knapsack over some steps; the rest of the budget is spent greedily."""
        ratio = self._ratio(targets)
        nothing = (0,) * len(self.levels)
        dense = ratio(nothing)
        if dense <= 1:
            return nothing
        points = {
            group.name: tuple((n / group.size, -losses[n]) for n in _some(levels) if n)
            for group, losses, levels in zip(self.scope.groups, self.losses, self.levels, strict=True)
        }
        recipe = Recipe(seed=self.request.recipe.seed)
        space = Space(self.request.model, recipe, self.candidates, self.inputs, Source(), (), ())
        choice = knapsack(space, Params(1 / dense), Scan(0.0, points, 0), predict=ratio)
        counts = [round(choice.shares[group.name] * group.size) for group in self.scope.groups]
        return self._spent(counts, ratio)

    def _ratio(self, targets: Sequence[Target]) -> Callable[[Counts], float]:
        """The remaining amount relative to the budget, for the target that is furthest from being met."""
        return lambda counts: max(over(self.candidates, target, counts) for target in targets)

    def filled(self, counts: Counts) -> tuple[Counts, str]:
        """Counts that use more of the budget, and a remark, if widths for hardware leave much of it unused.

        A network with few groups has few such widths: one group then has finer steps, of 4, 2 or 1 units.
        """
        ratio = self._ratio(self.targets)
        before, finer = ratio(counts), dict[str, int]()
        for step in (4, 2, 1):
            if not self.scope.rounded or ratio(counts) >= 1 - UNUSED:
                break
            fitting = [(r, other, k) for other, k in self._wider(counts, step) if (r := ratio(other)) <= 1]
            if fitting:
                _, counts, index = max(fitting)
                finer[self.scope.groups[index].name] = step
        if not finer:
            return counts, ""
        names = ", ".join(f"{name} (multiple of {step})" for name, step in finer.items())
        why = f"with widths for hardware alone, {1 - before:.1%} of the budget would be unused"
        return counts, f"finer widths: {names}; {why}"

    def _wider(self, counts: Counts, step: int) -> Iterator[tuple[Counts, int]]:
        """Counts with some more units of one group, in this step, that do not reach its next level."""
        for index, group in enumerate(self.scope.groups):
            level = max((n for n in self.levels[index] if n < counts[index]), default=counts[index])
            fine = math.lcm(group.multiple, step)
            for count in range(counts[index] - fine, level, -fine):
                yield (*counts[:index], count, *counts[index + 1 :]), index

    def _spent(self, counts: list[int], ratio: Callable[[Counts], float]) -> Counts:
        """Restore units as long as the targets are met, those with the largest loss per cost first."""
        closed = set[int]()
        while len(closed) < len(counts):
            at = ratio(tuple(counts))
            best, gain = -1, -1.0
            for index, levels in enumerate(self.levels):
                place = levels.index(counts[index])
                if index in closed or not place:
                    closed.add(index)
                    continue
                back = [*counts[:index], levels[place - 1], *counts[index + 1 :]]
                cost = ratio(tuple(back))
                if cost > 1:
                    closed.add(index)
                    continue
                saved = self.losses[index][counts[index]] - self.losses[index][levels[place - 1]]
                if saved / max(cost - at, 1e-12) > gain:
                    best, gain = index, saved / max(cost - at, 1e-12)
            if best >= 0:
                counts[best] = self.levels[best][self.levels[best].index(counts[best]) - 1]
        return tuple(counts)

    def fast(self, latency: Latency) -> Counts:
        """The counts with the most multiply-adds whose measured time meets a latency, and all other targets."""
        others = [target for target in self.targets if target is not latency]
        nothing = (0,) * len(self.levels)
        probe = self.request.probe
        low, high, best, seen = 0.0, 1.0, None, list[float]()
        share = min(1.0, latency.value) if latency.value <= 1 else 0.5
        for _ in range(TRIALS):
            targets = [*others, MACs(share)]
            if not reachable(self.request, self.scope, targets):
                low = max(low, share)
            else:
                counts = self.counts(targets)
                timing = probe.time(latency, self.candidates.keep(counts if any(counts) else nothing))
                asked = latency.value if latency.value <= 1 else latency.value / timing.dense
                seen.append(timing.ratio / asked)
                if timing.ratio <= asked:
                    low, best = share, counts
                    if timing.ratio > 0.95 * asked:
                        break
                else:
                    high = share
            share = (low + high) / 2 if best is not None or low else high / 2
        if best is None:
            fastest = min(seen, default=math.inf)
            why = f"the fastest of {len(seen)} measured models takes {fastest:.3g} times the requested latency"
            raise TargetMissed(f"{latency} cannot be met", why, "ask for a larger latency, or remove blocks (Depth())")
        return best


def _some(levels: Sequence[int]) -> list[int]:
    """At most `OPTIONS` of the steps, including the last one."""
    if len(levels) <= OPTIONS:
        return list(levels)
    return sorted({levels[round(k * (len(levels) - 1) / OPTIONS)] for k in range(OPTIONS + 1)})
