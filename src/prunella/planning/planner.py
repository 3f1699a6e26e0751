"""The whole pipeline: model -> graph -> groups -> criterion -> allocation -> keep and masks. Read this file first.

`plan()` only reads the model. `prunella.apply_` zeroes in place, `prunella.shrink` builds the smaller module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import Competing, Depth, Fixed, Ranked, Structural, Vocabulary
from prunella.graph.cut.changes import changes
from prunella.graph.data import Frozen, Graph, Group, Layer
from prunella.graph.match import check_patterns, chosen, names_of_group, names_of_layer, rank_of, spared_blocks
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.graph.solve.block_counters import counted
from prunella.graph.solve.groups import couple
from prunella.graph.solve.residual_blocks import narrow
from prunella.graph.verify import unproven
from prunella.model.state import untouched
from prunella.planning import table
from prunella.planning.candidates import Rules, Units, Weights, fixed_masks, obstacles, offer, share
from prunella.planning.checks import check_finite, checked_target
from prunella.planning.latency import Stopwatch
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe as Recipe
from prunella.planning.scoring import Absent, Scorer
from prunella.planning.table import Amount as Amount
from prunella.planning.table import Row as Row
from prunella.registry.controlled import name_of
from prunella.registry.method import knobs_of, needs_of
from prunella.stats import Source, Subject, collect
from prunella.stats.masked import Before, behind, masked
from prunella.stats.subject import first_seen
from prunella.targets import Latency, Target
from prunella.types import Inputs, Keep, Loss

DEFAULT = Recipe()


def plan(
    model: nn.Module,
    inputs: Inputs,
    recipe: Recipe = DEFAULT,
    *,
    target: Target | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Plan:
    """What to remove from `model` to meet `target`. Reads the model and changes nothing, not even a random generator.

    inputs: an example batch: a tensor, a tuple of arguments or a mapping of keywords; multiply-adds are of this batch.
    target: `Sparsity`, `Params`, `MACs`, `Bytes` or `Latency`. `NM`, of fixed sparsity, and `Vocabulary` do without.
    data, loss: batches, and a function of (model, batch), for criteria that need them. Without a loss a batch is passed
        as a mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`. The model runs in eval mode.
    skip, only: patterns (`fnmatch`) of names of groups, parameters or modules; a module stands for all that is in it.

    Errors: RequestError (the request makes no sense), BadInput (broken weights, data or inputs), NotSupported (nothing
    can be pruned), TargetMissed (says how far it got and what stopped it).
    """
    target = checked_target(recipe.grains, target)
    check_finite(model)
    with untouched(model, recipe.seed):
        graph = couple(model, inputs)
        check_patterns(graph, skip, only)
        if any(isinstance(grain, Depth) for grain in recipe.grains):
            graph = counted(model, narrow(graph, spared_blocks(graph, skip, only)), inputs)
        clock = Stopwatch(model, graph, inputs)
        job = Job(model, graph, recipe, target, Source(data, loss), tuple(skip), tuple(only), inputs, clock)
        return job.structure() if isinstance(recipe.grains[0], Structural) else job.masks()


@dataclass(frozen=True)
class Job:
    """One call of `plan`, or one round of `iterate`, which says what is masked already."""

    model: nn.Module
    graph: Graph
    recipe: Recipe
    target: Target
    source: Source
    skip: tuple[str, ...]
    only: tuple[str, ...]
    inputs: Inputs
    clock: Stopwatch
    before: Before | None = None

    # -- structure -----------------------------------------------------------------------------------------------

    def structure(self) -> Plan:
        """A plan that removes units; a group whose cut the oracle cannot prove is set aside with the reason."""
        groups, frozen = self.groups()
        decided = self._decided(groups)
        scored = self.score_groups([g for g in groups if g.kind != "vocabulary"], frozen)
        while True:
            keep = self._contest(scored, decided, frozen)
            faults = unproven(self.model, self.graph, keep, self.inputs)
            if not faults:
                break
            if faults.keys() <= decided.keys():
                why = next(faults[name] for name in decided if name in faults)
                raise NotSupported("tokens cannot be removed from this model", why, "leave Vocabulary out")
            frozen += [_set_aside(group, faults[group.name]) for group, _ in scored if group.name in faults]
            scored = [(group, scores) for group, scores in scored if group.name not in faults]
            if not scored and not decided:
                raise self._nothing("units", frozen)
        cut = [group for group in (*self.graph.groups, *self.graph.stacks) if group.name in keep]
        rows = table.group_rows(self.graph, cut, keep)
        made = self._plan(after=table.amount(self.graph, keep), rows=rows, frozen=frozen, keep=keep, masks={})
        if not isinstance(self.target, Latency):
            return made
        found, line = self.clock.says(self.target, keep)
        before, after = replace(made.before, latency=found.dense), replace(made.after, latency=found.small)
        return replace(made, before=before, after=after, remarks=(*made.remarks, line))

    def _decided(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The tokens that stay: those asked for and those that the model names."""
        found = [grain for grain in self.recipe.grains if isinstance(grain, Vocabulary)]
        table = self.graph.tokens
        if not found:
            return {}
        if table is None or table not in groups:
            why = "no table is looked up by an input, or it stays" if table is None else "skip= or only= leaves it out"
            raise NotSupported("there are no tokens to remove", why, "leave Vocabulary out")
        named = [t for value in self.graph.specials.values() for t in (value if isinstance(value, tuple) else (value,))]
        beyond = [token for token in found[0].tokens if token >= table.size]
        if beyond:
            raise RequestError(f"there is no token {beyond[0]}", f"{table.name} has {table.size} rows")
        keep = torch.zeros(table.size, dtype=torch.bool)
        keep[[*found[0].tokens, *(token for token in named if 0 <= token < table.size)]] = True
        return {table.name: keep}

    def _contest(self, scored: Sequence[tuple[Group, Tensor]], decided: Keep, frozen: Sequence[Frozen]) -> Keep:
        groups, scores = tuple(g for g, _ in scored), tuple(s for _, s in scored)
        contest = Units(self.graph, groups, scores, self.target, decided, self.clock)
        if not scored and all(isinstance(grain, Vocabulary) for grain in self.recipe.grains):
            return contest.keep(())
        if not scored:
            raise self._nothing("units", frozen)
        align = tuple(
            math.lcm(group.multiple, self.recipe.align if group.kind in ("channel", "width") else 1)
            for group in contest.groups
        )
        least = tuple(group.least for group in contest.groups)
        rules = Rules(self.recipe.allocation, self.recipe.floor, align, self.recipe.even, least, bool(decided))
        return contest.keep(share(contest, self.target, rules, frozen, self.graph))

    def groups(self) -> tuple[list[Group], list[Frozen]]:
        """Groups that take part, and what does not, with reasons."""
        kinds = {grain.kind for grain in self.recipe.grains if isinstance(grain, Structural)}
        mine, frozen = [], list(self.graph.frozen)
        if "block" in kinds:
            frozen += self.graph.rooted
        for group in (*self.graph.groups, *(self.graph.stacks if "block" in kinds else ())):
            reason = f"granularity is {' and '.join(sorted(kinds))}, this is {group.kind}"
            reason += f": {group.why}" if group.why else ""
            if group.kind in kinds:
                reason = "" if group.paths else chosen(names_of_group(self.graph, group), self.skip, self.only)
                reason = reason or ("" if self.only or group.paths else rank_of(self.graph, group))
            if group.kind == "vocabulary" in kinds and group is not self.graph.tokens:
                reason = "another table than that of the tokens"
            if not reason and group.size <= group.least:
                reason = "a single unit, which has to stay" if group.size == 1 else "all of its units are needed"
            frozen += [_set_aside(group, reason)] if reason else []
            mine += [] if reason else [group]
        if not mine:
            raise self._nothing("units", frozen)
        return mine, frozen

    def score_groups(self, groups: Sequence[Group], frozen: list[Frozen]) -> list[tuple[Group, Tensor]]:
        """Groups with a score for each unit; those that cannot be scored join `frozen` with the reason."""
        if not groups:
            return []
        reduce = {grain.kind: grain.reduce for grain in self.recipe.grains if isinstance(grain, Ranked)}
        scorer = self._scorer(Subject(self.model, self.graph, groups=tuple(groups), inputs=self.inputs))
        scored = []
        for group in groups:
            try:
                scored.append((group, scorer.units(group, reduce[group.kind])))
            except Absent as error:
                frozen.append(_set_aside(group, str(error)))
        if not scored:
            raise self._nothing("units", frozen)
        return scored

    # -- masks ---------------------------------------------------------------------------------------------------

    def masks(self) -> Plan:
        """A plan that zeroes weights."""
        candidates, frozen = self.layers()
        scored = self.score_layers(candidates, frozen)
        layers, scores = tuple(layer for layer, _ in scored), tuple(s for _, s in scored)
        pattern = self.recipe.grains[0]
        if isinstance(pattern, Fixed):
            matrices = fixed_masks(pattern, self.graph, layers, scores)
        else:
            assert isinstance(pattern, Competing)
            contest = Weights(self.graph, layers, scores, pattern)
            least = (self.recipe.least,) * len(layers)
            rules = Rules(
                self.recipe.allocation,
                self.recipe.floor,
                (1,) * len(layers),
                self.recipe.even,
                least,
                idle=self.before is not None,
            )
            matrices = contest.masks(share(contest, self.target, rules, frozen, self.graph))
        weights = Subject(self.model, self.graph).parameters
        masks = {x.entity: from_matrix(m, weights[x.entity], x) for x, m in zip(layers, matrices, strict=True)}
        rows = table.mask_rows(self.graph, layers, masks, table.pattern_name(pattern))
        return self._plan(after=table.masked_amount(self.graph, rows), rows=rows, frozen=frozen, keep={}, masks=masks)

    def layers(self) -> tuple[list[Layer], list[Frozen]]:
        """Layers that take part, each weight once, and what does not, with reasons."""
        mine, spared = [], []
        for layer in first_seen(self.graph.layers):
            reason = chosen(names_of_layer(self.graph, layer), self.skip, self.only)
            count = self.graph.entities[layer.entity].shape[layer.out_axis]
            spared += [Frozen(layer.entity, layer.out_axis, count, reason, "")] if reason else []
            mine += [] if reason else [layer]
        if not mine:
            raise self._nothing("weights", spared)
        return mine, spared

    def score_layers(self, layers: Sequence[Layer], frozen: list[Frozen]) -> list[tuple[Layer, Tensor]]:
        """Layers with a score for each weight; those that cannot be scored join `frozen` with the reason."""
        scorer = self._scorer(Subject(self.model, self.graph, layers=tuple(layers), inputs=self.inputs))
        scored = []
        for layer in layers:
            try:
                scored.append((layer, scorer.weights(layer)))
            except Absent as error:
                count = self.graph.entities[layer.entity].shape[layer.out_axis]
                frozen.append(Frozen(layer.entity, layer.out_axis, count, str(error), ""))
        if not scored:
            raise self._nothing("weights", frozen)
        if self.before is None or not self.before.nested:
            return scored
        masks = {
            x.entity: to_matrix(self.before.masks[x.entity], x) for x, _ in scored if x.entity in self.before.masks
        }
        ranked = behind({layer.entity: scores for layer, scores in scored}, masks)
        return [(layer, ranked[layer.entity]) for layer, _ in scored]

    # -- both ----------------------------------------------------------------------------------------------------

    def _scorer(self, subject: Subject) -> Scorer:
        needs = needs_of(self.recipe.criterion)
        name, knobs = name_of(self.recipe.criterion), knobs_of(self.recipe.criterion)
        with masked(subject.parameters, self.before.masks if self.before else {}):
            statistics = collect(subject, needs, self.source, name, knobs)
        return Scorer(self.recipe.criterion, subject, statistics, self.recipe.seed)

    def _nothing(self, what: str, frozen: Sequence[Frozen]) -> NotSupported:
        grains = ", ".join(name_of(type(grain)) for grain in self.recipe.grains)
        reasons = "\n".join(obstacles(self.graph, frozen)) or "the model has no layer that multiplies by a weight"
        return NotSupported(
            f"there are no {what} to prune for {grains}",
            reasons,
            offer(frozen) or "`prunella inspect` shows the groups",
        )

    def _plan(
        self,
        *,
        after: Amount,
        rows: tuple[Row, ...],
        frozen: Sequence[Frozen],
        keep: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> Plan:
        done = changes(self.graph, keep)
        return Plan(
            recipe=self.recipe.describe(),
            target=self.target,
            before=table.amount(self.graph, {}),
            after=after,
            keep=keep,
            masks=masks,
            cuts=done.cuts,
            attributes=done.attributes,
            along=done.along,
            renumbered=done.renumbered,
            rows=rows,
            frozen=tuple(frozen),
            inputs=self.inputs,
            remarks=(*table.remarks(self.graph), *table.emptied(rows)),
            dropped=done.dropped,
            lists=done.lists,
        )


# -- helpers ----------------------------------------------------------------------------------------------------


def _set_aside(group: Group, reason: str) -> Frozen:
    if group.paths:
        return Frozen(group.name, -1, group.size, reason, "")
    maker = next((m for m in group.members if m.role == "out"), group.members[0])
    return Frozen(maker.entity, maker.axis, len(maker.index), reason, group.where)
