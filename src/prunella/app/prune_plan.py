"""The plan of `prune`: units by elimination, widths by measured losses, every target met; each statistic once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from prunella.allocation import fixed
from prunella.app.prune_data import Batches, check_outputs, first, size
from prunella.app.prune_groups import Scope, missed, over, reachable, scope_of
from prunella.app.prune_stages import Running, StageTimer
from prunella.criteria import group_norm, obs_units
from prunella.errors import TargetMissed
from prunella.granularity import Channel, Expert, Head, Width
from prunella.graph.data import Group
from prunella.graph.verify import unproven
from prunella.io.identity import digest_of
from prunella.io.journal import Records
from prunella.measure.clock import now, since
from prunella.model.copying import copied
from prunella.model.forward import Outputs, judged_by, real_tokens
from prunella.model.state import mode, untouched
from prunella.planning.candidates import CandidateUnits
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.planning.request import Request, nothing_to_prune, prepare
from prunella.search.knapsack import knapsack
from prunella.search.measured import Curve, curves, every_step, recordings
from prunella.search.replay import Recording
from prunella.search.scan import Scan
from prunella.search.space import Space
from prunella.selection import Counts
from prunella.stats import Source, Subject
from prunella.stats.elimination import Readers, eliminate
from prunella.targets import Latency, MACs, Params, Target
from prunella.types import Inputs, Mask

FIT, JUDGE = 256, 128
"""Samples for the statistics, and for the measured losses."""
LEVELS = {5: (0.0625, 0.1875, 0.375, 0.625, 0.8125), 3: (0.1875, 0.4375, 0.75), 2: (0.25, 0.625)}
OPTIONS, TRIALS = 32, 6
"""Most widths of a group in the knapsack; most measurements of a latency."""
UNUSED = 0.03
"""Share of the budget that widths for hardware may leave unused."""
RIDGE, FEW_RIDGE = 1e-3, 1e-2
"""With many tokens, and with fewer than twice the inputs of a layer."""
Losses = Mapping[int, float]
"""Number of removed units -> the loss."""


@dataclass(frozen=True)
class Asked:
    """What `prune` was asked. run: gives the outputs of (model, batch)."""

    model: nn.Module
    inputs: Inputs
    targets: tuple[Target, ...]
    data: Batches | None
    run: Outputs
    skip: tuple[str, ...]
    only: tuple[str, ...]
    seed: int


def planned(asked: Asked, timer: StageTimer, records: Records) -> Plan:
    """The plan; the model does not change. records: keep each measured loss. Errors: those of `plan`."""
    replica = copied(asked.model)
    with untouched(replica, asked.seed), mode(replica, training=False), torch.no_grad():
        with timer.stage("groups") as stage:
            recipe = Recipe(group_norm, (Channel(), Head(), Width(), Expert()), seed=asked.seed)
            request = prepare(
                replica, asked.inputs, recipe, target=None, source=Source(), skip=asked.skip, only=asked.only
            )
            scope = scope_of(request, asked.targets)
            stage.note(_about(scope))
        if asked.data is None:
            scores = [scope.norms[group.name].double() for group in scope.groups]
            losses: list[Losses] = [_by_norm(values, scope.levels(k)) for k, values in enumerate(scores)]
        else:
            scores, losses = _Measured(asked, asked.data, request, scope, timer, records).result()
        with timer.stage("allocation") as stage:
            return _allocated(asked, request, scope, scores, losses, stage)


def _about(scope: Scope) -> str:
    which = "groups, with the residual stream" if scope.streams else "groups inside blocks"
    return f"{len(scope.groups)} {which}" + (", widths in steps for hardware" if scope.rounded else "")


# -- scores and losses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """The units by elimination, and the losses of real cuts."""

    asked: Asked
    data: Batches
    request: Request
    scope: Scope
    timer: StageTimer
    records: Records

    def result(self) -> tuple[list[Tensor], list[Losses]]:
        """For each group the scores of its units, and the loss of each step."""
        with self.timer.stage("statistics") as stage:
            readers = self._gather(stage)
            predicted = self._eliminated(readers, stage)
        scores = [predicted.get(group.name, self.scope.norms[group.name]).double() for group in self.scope.groups]
        losses = self._losses(readers, predicted, scores)
        return scores, losses

    def _gather(self, stage: Running) -> Readers:
        """The inputs of all readers, in one pass."""
        model = self.request.model
        readers = Readers(Subject(model, self.request.graph, groups=self.scope.groups).parameters, self.scope.groups)
        batches = first(self.data.fit, FIT)
        start, share, key = now(), 0.3 * self.timer.left, "batches of the statistics"
        most = int(self.records.number(key, lambda: 0)) if key in self.records else len(batches)
        for number, batch in enumerate(batches, start=1):
            with readers.watch(real_tokens(batch)):
                output = judged_by(self.asked.run)(model, batch)
            check_outputs(output, batch, self.data.every)
            stage.tick(number, len(batches))
            used_up = key not in self.records and since(start) * (number + 1) / number > share
            if (used_up or number == most) and number < len(batches):
                stage.note(f"{number} of {len(batches)} batches: budget")
                break
        self.records.number(key, lambda: number)
        return readers

    def _eliminated(self, readers: Readers, stage: Running) -> dict[str, Tensor]:
        """Group -> the relative loss at which each unit goes; groups without a readable reader are left out."""
        losses, tokens, start = {}, list[float](), now()
        for number, group in enumerate(self.scope.groups, start=1):
            parts = readers.of(group.name)
            tokens += [reader.covariance.tokens / len(quadratic.units) for reader, quadratic in parts]
            if parts:
                ridge = FEW_RIDGE if min(tokens) < 2 else RIDGE
                losses[group.name] = eliminate([quadratic for _, quadratic in parts], group.size, ridge=ridge).losses
            stage.tick(number, len(self.scope.groups))
        unread = [group.name for group in self.scope.groups if group.name not in losses]
        if unread:
            stage.note(f"by norm, since no layer that reads them can be refitted: {', '.join(unread[:3])}")
        stage.note(f"elimination {since(start):.1f} s")
        return losses

    def _losses(self, readers: Readers, predicted: Mapping[str, Tensor], scores: Sequence[Tensor]) -> list[Losses]:
        groups = [(k, group) for k, group in enumerate(self.scope.groups) if group.name in predicted]
        points = self._curves(readers, groups, scores)
        losses = list[Losses]()
        for index, group in enumerate(self.scope.groups):
            levels = self.scope.levels(index)
            if points.get(group.name):
                steps = every_step(points[group.name], levels, group.size)
                losses.append({0: 0.0} | {round(x * group.size): -value for x, value in steps})
            elif group.name in predicted:
                ordered = predicted[group.name].sort().values
                losses.append({n: float(ordered[n - 1]) if n else 0.0 for n in levels})
            else:
                losses.append(_by_norm(scores[index], levels))
        return losses

    def _curves(
        self, readers: Readers, groups: Sequence[tuple[int, Group]], scores: Sequence[Tensor]
    ) -> dict[str, Curve]:
        """Group -> points (fraction removed, loss); none where the budget has no time for them."""
        if not groups:
            return {}
        with self.timer.stage("measured losses") as stage:
            start, batches = now(), first(self.data.held_out, JUDGE)
            passes = recordings(self.request.model, batches, judged_by(self.asked.run))
            for batch, recording in zip(batches, passes, strict=True):
                check_outputs(recording.output, batch, self.data.every)
            each = len(groups) * since(start)
            affordable = next((n for n in LEVELS if n * each <= 0.5 * self.timer.left), 0)
            count = int(self.records.number("levels of each group", lambda: affordable))
            if count < 5:
                what = f"{count} levels of each group" if count else "scores without measured losses"
                stage.note(f"{what} for lack of time (budget)")
            masks = [self._masks(index, group, scores[index], LEVELS.get(count, ())) for index, group in groups]
            total = sum(map(len, masks))
            points = self._points(passes, readers, [group for _, group in groups], masks, stage)
            stage.note(f"{total} cuts judged on {sum(map(size, batches))} samples" if total else "")
        return points

    def _points(
        self,
        passes: Sequence[Recording],
        readers: Readers,
        groups: Sequence[Group],
        masks: Sequence[Mapping[int, Mask]],
        stage: Running,
    ) -> dict[str, Curve]:
        """Group -> its points in ascending order, each recorded as soon as it is measured."""
        data = digest_of(self.data.parts) if self.records.kept else ""

        def key(name: str, x: float) -> str:
            return f"loss of {name} without {x!r} on {data}"

        todo = [
            {count: keep for count, keep in cuts.items() if key(group.name, count / group.size) not in self.records}
            for group, cuts in zip(groups, masks, strict=True)
        ]
        total, left = sum(map(len, masks)), sum(map(len, todo))
        measuring = curves(passes, readers, groups, todo, ridge=self._ridge(readers))
        for number, (name, x, loss) in enumerate(measuring, start=total - left + 1):
            self.records.add(key(name, x), {"value": loss if math.isfinite(loss) else 1e6})
            stage.tick(number, total)
        return {
            group.name: [(n / group.size, float(self.records[key(group.name, n / group.size)]["value"])) for n in cuts]
            for group, cuts in zip(groups, masks, strict=True)
        }

    def _ridge(self, readers: Readers) -> float:
        few = any(
            reader.covariance.tokens < 2 * len(quadratic.units)
            for group in self.scope.groups for reader, quadratic in readers.of(group.name)
        )  # fmt: skip
        return FEW_RIDGE if few else RIDGE

    def _masks(self, index: int, group: Group, scores: Tensor, levels: Sequence[float]) -> dict[int, Mask]:
        steps = self.scope.levels(index)
        wanted = {min(steps, key=lambda n: (abs(n - level * group.size), n)) for level in levels} - {0}
        order = CandidateUnits(self.request.graph, (group,), (scores,))
        return {count: order.keep((count,))[group.name] for count in sorted(wanted)}


def _by_norm(scores: Tensor, levels: Sequence[int]) -> dict[int, float]:
    """`-log(1 - share)` with the share of the group's squared norm that goes: no group is emptied cheaply."""
    squares = scores.double().square().sort().values
    total = float(squares.sum()) or 1.0
    shares = squares.cumsum(0) / total
    return {n: -math.log(max(1e-9, 1 - float(shares[n - 1]))) + 1e-6 * n if n else 0.0 for n in levels}


# -- allocation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """The choice of widths: the smallest sum of losses that meets all targets."""

    asked: Asked
    request: Request
    scope: Scope
    candidates: CandidateUnits
    losses: Sequence[Losses]

    @cached_property
    def levels(self) -> list[list[int]]:
        """The steps of each group."""
        return [self.scope.levels(index) for index in range(len(self.scope.groups))]

    def counts(self, targets: Sequence[Target]) -> Counts:
        """Units that go from each group, by a knapsack over some steps; what is left is spent by loss per cost."""
        ratio = self._ratio(targets)
        nothing = (0,) * len(self.levels)
        dense = ratio(nothing)
        if dense <= 1:
            return nothing
        points = {
            group.name: tuple((n / group.size, -losses[n]) for n in _some(levels) if n)
            for group, losses, levels in zip(self.scope.groups, self.losses, self.levels, strict=True)
        }
        recipe = Recipe(seed=self.asked.seed)
        space = Space(self.request.model, recipe, self.candidates, self.asked.inputs, Source(), (), ())
        choice = knapsack(space, Params(1 / dense), Scan(0.0, points, 0), predict=ratio)
        counts = [round(choice.shares[group.name] * group.size) for group in self.scope.groups]
        return self._spent(counts, ratio)

    def _ratio(self, targets: Sequence[Target]) -> Callable[[Counts], float]:
        """What remains relative to the budget, of the target that is furthest from its own."""
        return lambda counts: max(over(self.candidates, target, counts) for target in targets)

    def filled(self, counts: Counts) -> tuple[Counts, str]:
        """Counts that use more of the budget, and a remark, where widths for hardware leave much of it unused.

        A network with few groups has few widths: one group has finer steps then, of 4, 2 or 1 units.
        """
        ratio = self._ratio(self.asked.targets)
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
        """Give units back as long as the targets are met, those first that lose most for their cost."""
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
        """The largest share of multiply-adds whose measured time meets a latency, and all other targets."""
        others = [target for target in self.asked.targets if target is not latency]
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
            why = f"the fastest of {len(seen)} measured models takes {fastest:.3g} of what was asked"
            raise TargetMissed(f"{latency} cannot be met", why, "ask for a larger latency, or remove blocks (Depth())")
        return best


def _allocated(
    asked: Asked, request: Request, scope: Scope, scores: Sequence[Tensor], losses: Sequence[Losses], stage: Running
) -> Plan:
    """The plan, proven by the oracle; groups that cannot be proven are left out."""
    while True:
        candidates = CandidateUnits(request.graph, scope.groups, tuple(scores))
        choice = _Choice(asked, request, scope, candidates, losses)
        latency = next((target for target in asked.targets if isinstance(target, Latency)), None)
        if not reachable(request, scope, asked.targets):
            raise missed(request, scope, asked.targets)
        counts, remark = (choice.fast(latency), "") if latency else choice.filled(choice.counts(asked.targets))
        keep = candidates.keep(counts)
        faults = unproven(request.model, request.graph, keep, request.inputs)
        if not faults:
            break
        kept = [index for index, group in enumerate(scope.groups) if group.name not in faults]
        scores, losses = [scores[index] for index in kept], [losses[index] for index in kept]
        scope = scope.without(faults)
        stage.note(f"left out, since its cut is not proven: {', '.join(faults)}")
        if not scope.groups:
            raise nothing_to_prune(request, "units", scope.frozen)
    if remark:
        stage.note(remark)
    return _plan(asked, request, scope, keep, (remark,) if remark else ())


def _plan(asked: Asked, request: Request, scope: Scope, keep: dict[str, Tensor], remarks: tuple[str, ...]) -> Plan:
    shares = {group.name: 1 - float(keep[group.name].double().mean()) for group in scope.groups}
    recipe = Recipe(
        obs_units if asked.data else group_norm,
        (Channel(), Head(), Width(), Expert()),
        partial(fixed, shares=shares),
        seed=asked.seed,
    )
    plan = Plan.of_structure(
        request.graph,
        keep,
        inputs=request.inputs,
        frozen=scope.frozen,
        recipe=recipe.describe(),
        target=asked.targets[0],
    )
    plan = replace(plan, remarks=(*plan.remarks, *remarks))
    latency = next((target for target in asked.targets if isinstance(target, Latency)), None)
    if latency is None:
        return plan
    timing, line = request.probe.measured(latency, keep)
    before, after = replace(plan.before, latency=timing.dense), replace(plan.after, latency=timing.small)
    return replace(plan, before=before, after=after, remarks=(*plan.remarks, line))


def _some(levels: Sequence[int]) -> list[int]:
    """At most `OPTIONS` of the steps, the last one among them."""
    if len(levels) <= OPTIONS:
        return list(levels)
    return sorted({levels[round(k * (len(levels) - 1) / OPTIONS)] for k in range(OPTIONS + 1)})
