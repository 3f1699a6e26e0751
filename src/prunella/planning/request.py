"""The request of a plan, the eligible groups and layers, and their scores: functions of a frozen `Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import Depth, Ranked, Structural, Vocabulary
from prunella.graph.data import Frozen, Graph, Group, Kind, Layer, ReasonKind
from prunella.graph.match import check_patterns, chosen, names_of_group, names_of_layer, rank_of, spared_blocks
from prunella.graph.matrix import to_matrix
from prunella.graph.solve.block_counters import counted
from prunella.graph.solve.groups import couple
from prunella.graph.solve.residual_blocks import narrow
from prunella.graph.variants import Variant, Variants
from prunella.model.copying import ordinary
from prunella.planning.by_hand import ByHand
from prunella.planning.checks import foreign_weights
from prunella.planning.coverage import unmaskable
from prunella.planning.diagnostics import obstacles, offer
from prunella.planning.latency import LatencyProbe
from prunella.planning.recipe import Recipe
from prunella.planning.scoring import Absent, Scorer
from prunella.registry.controlled import name_of
from prunella.registry.method import knobs_of, needs_of
from prunella.stats import Source, Subject, collect
from prunella.stats.masked import Before, behind, masked
from prunella.stats.subject import first_seen
from prunella.targets import Target
from prunella.types import Examples, Inputs

GroupScores = tuple[Group, Tensor]
LayerScores = tuple[Layer, Tensor]
MOST_EXAMPLES = 4
"""Most examples of other sizes that are traced, each after a cut was wrong on it."""
NOTHING_BY_HAND = ByHand()


@dataclass(frozen=True)
class Request:
    """A model with its coupling graph, and the request.

    target: None if the recipe or a search determines the counts. before: masks of earlier rounds.
    others: further examples, traced into the same graph. by_hand: units chosen by name, regardless of the budget.
    tried: batches with other arguments; None before they are searched. traced: those of them in the graph.
    wrong: groups that stay, since a cut of them is wrong with such arguments, with the reason.
    """

    model: nn.Module
    graph: Graph
    recipe: Recipe
    target: Target | None
    source: Source
    skip: tuple[str, ...]
    only: tuple[str, ...]
    inputs: Inputs
    probe: LatencyProbe
    before: Before | None = None
    others: tuple[Inputs, ...] = ()
    by_hand: ByHand = NOTHING_BY_HAND
    tried: Variants | None = None
    traced: tuple[Variant, ...] = ()
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def examples(self) -> Examples:
        """All examples."""
        return Examples(self.inputs, *self.others)

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, with the choices by hand."""
        by_hand = {"by_hand": self.by_hand.describe()} if self.by_hand else {}
        return {**self.recipe.describe(), **by_hand}


def prepare(
    model: nn.Module,
    inputs: Inputs | Examples,
    recipe: Recipe,
    *,
    target: Target | None,
    source: Source,
    skip: Sequence[str],
    only: Sequence[str],
    by_hand: ByHand = NOTHING_BY_HAND,
) -> Request:
    """Couple the model and check the patterns. Use it inside `untouched`. Errors: those of `couple`, RequestError."""
    model = ordinary(model)
    first, others = Examples.split(inputs)
    graph = _coupled(model, first, others, recipe, skip, only)
    probe = LatencyProbe(model, graph, first)
    return Request(
        model, graph, recipe, target, source, tuple(skip), tuple(only), first, probe, others=others, by_hand=by_hand
    )


def with_example(request: Request, example: Inputs) -> Request:
    """The request with one more example in its graph; earlier reasons are kept. Errors: those of `couple`."""
    return _widened(request, (*request.others, example), request.traced)


def with_arguments(request: Request, wrong: Sequence[Variant]) -> Request:
    """The same with batches that have other arguments."""
    return _widened(request, request.others, (*request.traced, *wrong))


def _widened(request: Request, others: tuple[Inputs, ...], traced: tuple[Variant, ...]) -> Request:
    graph = _coupled(request.model, request.inputs, others, request.recipe, request.skip, request.only, traced)
    reasons = {(entry.entity, entry.axis, entry.count): entry for entry in request.graph.frozen}
    told = tuple(reasons.get((entry.entity, entry.axis, entry.count), entry) for entry in graph.frozen)
    graph = replace(graph, frozen=told)
    probe = LatencyProbe(request.model, graph, request.inputs)
    return replace(request, graph=graph, probe=probe, others=others, traced=traced)


def _coupled(
    model: nn.Module,
    inputs: Inputs,
    others: tuple[Inputs, ...],
    recipe: Recipe,
    skip: Sequence[str],
    only: Sequence[str],
    traced: Sequence[Variant] = (),
) -> Graph:
    graph = couple(model, inputs, others, [(variant.text, variant.batch) for variant in traced])
    check_patterns(graph, skip, only)
    if any(isinstance(granularity, Depth) for granularity in recipe.granularities):
        graph = counted(model, narrow(graph, spared_blocks(graph, skip, only)), inputs)
    return graph


# -- groups of units ---------------------------------------------------------------------------------------------


def eligible_groups(request: Request) -> tuple[list[Group], list[Frozen]]:
    """Eligible groups, and the frozen axes with reasons. Errors: NotSupported if no group is eligible."""
    graph = request.graph
    kinds = {entry.kind for entry in request.recipe.granularities if isinstance(entry, Structural)}
    groups, frozen = list[Group](), list(graph.frozen)
    if "block" in kinds:
        frozen += graph.rooted
    for group in (*graph.groups, *(graph.stacks if "block" in kinds else ())):
        reason, kind = _excluded(request, group, kinds)
        if reason:
            frozen.append(set_aside(group, reason, kind))
        else:
            groups.append(group)
    if not groups:
        raise nothing_to_prune(request, "units", frozen)
    return groups, frozen


def _excluded(request: Request, group: Group, kinds: Set[Kind]) -> tuple[str, ReasonKind]:
    """Why a group is not eligible; empty if it is."""
    if group.name in request.wrong:
        return request.wrong[group.name], ReasonKind.UNPROVEN
    reason = f"granularity is {' and '.join(sorted(kinds))}, this is {group.kind}"
    reason += f": {group.why}" if group.why else ""
    if group.kind in kinds:
        names = names_of_group(request.graph, group)
        reason = "" if group.paths else chosen(names, request.skip, request.only)
        reason = reason or ("" if request.only or group.paths else rank_of(request.graph, group))
    if group.kind == "vocabulary" in kinds and group is not request.graph.tokens:
        reason = "not the embedding table of the tokens"
    if not reason and group.size <= group.min_units:
        reason = "a single unit, which has to be kept" if group.size == 1 else "all of its units are needed"
        return reason, ReasonKind.MINIMUM
    return reason, ReasonKind.REQUEST


def kept_tokens(request: Request, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Group -> the kept tokens: those of the request and those that the model names."""
    vocabulary = next((entry for entry in request.recipe.granularities if isinstance(entry, Vocabulary)), None)
    table = request.graph.tokens
    if vocabulary is None:
        return {}
    if table is None or table not in groups:
        why = (
            "no input indexes an embedding table, or the table is frozen"
            if table is None
            else "skip= or only= leaves it out"
        )
        raise NotSupported("there are no tokens to remove", why, "leave Vocabulary out")
    specials = request.graph.specials.values()
    named = [token for value in specials for token in (value if isinstance(value, tuple) else (value,))]
    out_of_range = [token for token in vocabulary.tokens if token >= table.size]
    if out_of_range:
        raise RequestError(f"there is no token {out_of_range[0]}", f"{table.name} has {table.size} rows")
    keep = torch.zeros(table.size, dtype=torch.bool, device="cpu")
    keep[[*vocabulary.tokens, *(token for token in named if 0 <= token < table.size)]] = True
    return {table.name: keep}


def score_groups(
    request: Request, groups: Sequence[Group], frozen: Sequence[Frozen]
) -> tuple[list[GroupScores], list[Frozen]]:
    """Groups with a score for each unit; groups that cannot be scored become frozen, with the reason."""
    if not groups:
        return [], list(frozen)
    reduce = {entry.kind: entry.reduce for entry in request.recipe.granularities if isinstance(entry, Ranked)}
    scorer = _scorer(request, Subject(request.model, request.graph, groups=tuple(groups), inputs=request.inputs))
    scored, aside = list[GroupScores](), list(frozen)
    for group in groups:
        try:
            scored.append((group, scorer.units(group, reduce[group.kind])))
        except Absent as error:
            aside.append(set_aside(group, str(error), ReasonKind.UNSCORED))
    if not scored:
        raise nothing_to_prune(request, "units", aside)
    return scored, aside


def set_aside(group: Group, reason: str, kind: ReasonKind) -> Frozen:
    """A frozen entry for a group that is not pruned."""
    if group.paths:
        return Frozen(group.name, -1, group.size, reason, "", kind)
    maker = next((m for m in group.members if m.role == "out"), group.members[0])
    return Frozen(maker.entity, maker.axis, len(maker.index), reason, group.where, kind)


# -- layers of weights -------------------------------------------------------------------------------------------


def eligible_layers(request: Request) -> tuple[list[Layer], list[Frozen]]:
    """Eligible layers, each weight once, and the frozen entries with reasons."""
    layers, frozen = list[Layer](), list(unmaskable(request.graph))
    for layer in first_seen(request.graph.layers):
        reason = chosen(names_of_layer(request.graph, layer), request.skip, request.only)
        if reason:
            frozen.append(_layer_aside(request.graph, layer, reason, ReasonKind.REQUEST))
        elif layer.entity in request.graph.shared:
            shared = request.graph.shared[layer.entity]
            frozen.append(_layer_aside(request.graph, layer, shared, ReasonKind.OPERATION))
        else:
            layers.append(layer)
    if not layers:
        raise nothing_to_prune(request, "weights", frozen)
    return layers, frozen


def score_layers(
    request: Request, layers: Sequence[Layer], frozen: Sequence[Frozen]
) -> tuple[list[LayerScores], list[Frozen]]:
    """Layers with a score for each weight; layers that cannot be scored become frozen, with the reason."""
    scorer = _scorer(request, Subject(request.model, request.graph, layers=tuple(layers), inputs=request.inputs))
    scored, aside = list[LayerScores](), list(frozen)
    for layer in layers:
        try:
            scored.append((layer, scorer.weights(layer)))
        except Absent as error:
            aside.append(_layer_aside(request.graph, layer, str(error), ReasonKind.UNSCORED))
    if not scored:
        raise nothing_to_prune(request, "weights", aside)
    return _masked_last(request.before, scored), aside


def _masked_last(before: Before | None, scored: list[LayerScores]) -> list[LayerScores]:
    """Rank weights masked in earlier rounds behind all others, unless they may be restored."""
    if before is None or not before.nested:
        return scored
    masks = {x.entity: to_matrix(before.masks[x.entity], x) for x, _ in scored if x.entity in before.masks}
    ranked = behind({layer.entity: scores for layer, scores in scored}, masks)
    return [(layer, ranked[layer.entity]) for layer, _ in scored]


def _layer_aside(graph: Graph, layer: Layer, reason: str, kind: ReasonKind) -> Frozen:
    rows = graph.entities[layer.entity].shape[layer.out_axis]
    return Frozen(layer.entity, layer.out_axis, rows, reason, "", kind)


# -- both --------------------------------------------------------------------------------------------------------


def _scorer(request: Request, subject: Subject) -> Scorer:
    criterion = request.recipe.criterion
    with masked(subject.parameters, request.before.masks if request.before else {}):
        statistics = collect(subject, needs_of(criterion), request.source, name_of(criterion), knobs_of(criterion))
    return Scorer(criterion, subject, statistics, request.recipe.seed)


def nothing_to_prune(request: Request, what: str, frozen: Sequence[Frozen]) -> NotSupported:
    """The error of a model without eligible groups or layers."""
    names = ", ".join(name_of(type(entry)) for entry in request.recipe.granularities)
    no_weight = "the model has no parameters, and so no layer that multiplies by a weight"
    foreign = foreign_weights(request.model)
    reasons = "\n".join([*obstacles(request.graph, frozen), *foreign]) or no_weight
    todo = offer(frozen) or (
        "prune the model before its weights are converted" if foreign else "`prunella inspect` shows the groups"
    )
    return NotSupported(f"there are no {what} to prune for {names}", reasons, todo)
