"""The plan of `prune`: units by elimination, widths by measured losses, all targets met; statistics are shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from prunella.allocation import fixed
from prunella.app.prune_data import Batches, check_outputs, first, size
from prunella.app.prune_groups import Scope, missed, reachable, scope_of
from prunella.app.prune_stages import Running, StageTimer
from prunella.app.prune_widths import WidthChoice
from prunella.criteria import group_norm, obs_units
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
from prunella.search.measured import Curve, curves, distance_of, divergence, every_step, recordings
from prunella.search.replay import Recording
from prunella.stats import Source, Subject
from prunella.stats.elimination import Readers, eliminate
from prunella.targets import Latency, Target
from prunella.types import Inputs, Mask

FIT, JUDGE = 256, 64
"""Number of samples for the statistics, and for the measured losses."""
TEMPERATURE = 2.0
"""Of the measured losses of logits. The plain divergence depends on the few samples that a cut answers otherwise. Error
of the logarithms of the losses by the choice of 64 samples, relative to 1,024 and 512 samples, with temperatures 1 / 2
/ 4: ResNet-20 .31 / .21 / .21, ResNet-56 .43 / .29 / .30, as large as with 128 samples and temperature 1; seed 10."""
LEVELS = {5: (0.0625, 0.1875, 0.375, 0.625, 0.8125), 3: (0.1875, 0.4375, 0.75), 2: (0.25, 0.625)}
REFITTED = 0.2
"""The loss of a cut in the first layers after a refit of all later layers, relative to the same in the last layers: a
refit compensates the effect of earlier cuts on its inputs. ResNet-20 at half of its multiply-adds, four seeds,
measured with all these refits: .2 to .5 in the first stage, .4 to .7 in the second, .8 to 1.1 in the third."""
RIDGE, FEW_RIDGE = 1e-3, 1e-2
"""Ridge with many tokens, and with fewer tokens than twice the inputs of a layer."""
Losses = Mapping[int, float]
"""Number of removed units -> the loss."""


@dataclass(frozen=True)
class Asked:
    """The arguments of `prune`. run: gives the outputs of (model, batch). refits: whether `reconstruct` will follow."""

    model: nn.Module
    inputs: Inputs
    targets: tuple[Target, ...]
    data: Batches | None
    run: Outputs
    skip: tuple[str, ...]
    only: tuple[str, ...]
    seed: int
    refits: bool = True


def planned(asked: Asked, timer: StageTimer, records: Records) -> Plan:
    """The plan; the model does not change. records: stores each measured loss. Errors: those of `plan`."""
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
        """The input statistics of all reading layers, in one pass over the batches."""
        model = self.request.model
        readers = Readers(Subject(model, self.request.graph, groups=self.scope.groups).parameters, self.scope.groups)
        batches = first(self.data.fit, FIT)
        start, share, key = now(), 0.3 * self.timer.left, "batches of the statistics"
        most = self.records.count(key, lambda: 0) if key in self.records else len(batches)
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
        """Group -> the relative loss at which each unit is eliminated; only groups whose readers have statistics."""
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
        remaining = self._remaining(readers.order, points)
        losses = list[Losses]()
        for index, group in enumerate(self.scope.groups):
            levels = self.scope.levels(index)
            if points.get(group.name):
                steps = every_step(points[group.name], levels, group.size)
                share = remaining[group.name]
                losses.append({0: 0.0} | {round(x * group.size): -value * share for x, value in steps})
            elif group.name in predicted:
                ordered = predicted[group.name].sort().values
                losses.append({n: float(ordered[n - 1]) if n else 0.0 for n in levels})
            else:
                losses.append(_by_norm(scores[index], levels))
        return losses

    def _remaining(self, order: Sequence[str], points: Mapping[str, Curve]) -> dict[str, float]:
        """Group -> the fraction of its loss left after refits of later layers, from `REFITTED` to 1 in model order."""
        places = [name for name in order if points.get(name)]
        last = max(1, len(places) - 1)
        return {name: REFITTED ** (1 - k / last) if self.asked.refits else 1.0 for k, name in enumerate(places)}

    def _curves(
        self, readers: Readers, groups: Sequence[tuple[int, Group]], scores: Sequence[Tensor]
    ) -> dict[str, Curve]:
        """Group -> points (fraction removed, loss); empty if the budget leaves no time for them."""
        if not groups:
            return {}
        with self.timer.stage("measured losses") as stage:
            start, batches = now(), first(self.data.held_out, JUDGE)
            passes = recordings(self.request.model, batches, judged_by(self.asked.run))
            for batch, recording in zip(batches, passes, strict=True):
                check_outputs(recording.output, batch, self.data.every)
            each = len(groups) * since(start)
            affordable = next((n for n in LEVELS if n * each <= 0.5 * self.timer.left), 0)
            count = self.records.count("levels of each group", lambda: affordable)
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
        """Group -> its points in ascending order; each is recorded as soon as it is measured."""
        data = digest_of(self.data.parts) if self.records.kept else ""

        def key(name: str, x: float) -> str:
            return f"softened loss of {name} without {x!r} on {data}"

        todo = [
            {count: keep for count, keep in cuts.items() if key(group.name, count / group.size) not in self.records}
            for group, cuts in zip(groups, masks, strict=True)
        ]
        total, left = sum(map(len, masks)), sum(map(len, todo))
        logits = distance_of(passes[0].output) is divergence
        softened = partial(divergence, temperature=TEMPERATURE) if logits else None
        measuring = curves(passes, readers, groups, todo, ridge=self._ridge(readers), distance=softened)
        for number, (name, x, loss) in enumerate(measuring, start=total - left + 1):
            self.records.add(key(name, x), {"value": loss if math.isfinite(loss) else 1e6})
            stage.tick(number, total)
        return {
            group.name: [
                (n / group.size, self.records.fields(key(group.name, n / group.size)).number("value")) for n in cuts
            ]
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
    """`-log(1 - share)` with the removed share of the group's squared norm: emptying a group is always expensive."""
    squares = scores.double().square().sort().values
    total = float(squares.sum()) or 1.0
    shares = squares.cumsum(0) / total
    return {n: -math.log(max(1e-9, 1 - float(shares[n - 1]))) + 1e-6 * n if n else 0.0 for n in levels}


# -- allocation ----------------------------------------------------------------------------------------------------


def _allocated(
    asked: Asked, request: Request, scope: Scope, scores: Sequence[Tensor], losses: Sequence[Losses], stage: Running
) -> Plan:
    """The plan, proven by the oracle; groups that cannot be proven are left out."""
    while True:
        candidates = CandidateUnits(request.graph, scope.groups, tuple(scores))
        choice = WidthChoice(request, scope, candidates, losses, asked.targets, asked.inputs)
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
