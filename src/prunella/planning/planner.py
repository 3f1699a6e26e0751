"""The whole pipeline: model -> graph -> groups -> criterion -> allocation -> keep and masks. Read this file first.

`plan()` only reads the model. `prunella.apply_` zeroes in place, `prunella.shrink` builds the smaller module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prunella.errors import NotSupported, RequestError, TargetMissed
from prunella.granularity import Competing, Fixed, Structural, Vocabulary
from prunella.graph.data import Frozen, ReasonKind
from prunella.graph.matrix import from_matrix
from prunella.graph.other_sizes import disagreement, shape_text, wrong_branch
from prunella.graph.verify import unproven
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.accounting import pattern_name
from prunella.planning.candidates import (
    BudgetRules,
    CandidateUnits,
    CandidateWeights,
    allocate_budget,
    fixed_masks,
)
from prunella.planning.checks import check_finite, checked_target, foreign_weights
from prunella.planning.plan import Plan
from prunella.planning.readable import Builds, Misfit, parts_at_fault, undescribed
from prunella.planning.recipe import Recipe
from prunella.planning.request import (
    MOST_EXAMPLES,
    GroupScores,
    LayerScores,
    Request,
    eligible_groups,
    eligible_layers,
    kept_tokens,
    nothing_to_prune,
    prepare,
    score_groups,
    score_layers,
    set_aside,
    with_example,
)
from prunella.stats import Source, Subject
from prunella.targets import Latency, Target
from prunella.types import Examples, Inputs, Keep, Loss, Mask

DEFAULT = Recipe()


def plan(
    model: nn.Module,
    inputs: Inputs | Examples,
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
        `prunella.Examples` holds several, where the model does something else for other sizes.
    target: `Sparsity`, `Params`, `MACs`, `Bytes` or `Latency`. `NM`, of fixed sparsity, and `Vocabulary` do without.
    data, loss: batches, and a function of (model, batch), for criteria that need them. Without a loss a batch is passed
        as a mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`. The model runs in eval mode.
    skip, only: patterns (`fnmatch`) of names of groups, parameters or modules; a module stands for all that is in it.

    Errors: RequestError (the request makes no sense), BadInput (broken weights, data or inputs), NotSupported (nothing
    can be pruned), TargetMissed (says how far it got and what stopped it).

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.5))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '8 of 16'}
    """
    if not isinstance(recipe, Recipe):
        raise RequestError(
            f"the recipe is a {type(recipe).__name__}", "a criterion is a part of a recipe", "Recipe(criterion=...)"
        )
    model = with_plain_weights(model)
    target = checked_target(recipe.granularities, target)
    check_finite(model)
    with untouched(model, recipe.seed):
        request = prepare(model, inputs, recipe, target=target, source=Source(data, loss), skip=skip, only=only)
        structural = isinstance(recipe.granularities[0], Structural)
        made = plan_structure(request) if structural else plan_masks(request)
    return replace(made, remarks=(*made.remarks, *foreign_weights(model)))


# -- structure ---------------------------------------------------------------------------------------------------


def plan_structure(request: Request) -> Plan:
    """A plan that removes units; a group whose cut the oracle cannot prove is set aside with the reason.

    An input of another size on which the cut is wrong is traced too: it shows what is coupled or frozen there.
    """
    asked = request
    for _ in range(MOST_EXAMPLES):
        request, keep, frozen = _described(request, _scored(request))
        other = disagreement(request.model, request.graph, keep, request.inputs, request.others)
        if other is None:
            _check_branches(request, keep)
            made = _plan_of(request, keep, frozen)
            return replace(made, remarks=(*made.remarks, *_added(asked, request)))
        request = with_example(request, other)
    raise NotSupported(
        "the cuts of this model are right for the size of the example only",
        f"on an input of {shape_text(other)} the smaller model is another one, also when that is traced too",
        "prune less of it: skip=, only=",
    )


def _check_branches(request: Request, keep: Keep) -> None:
    """Errors: NotSupported if the cut is wrong on the other side of a branch on a value."""
    place = wrong_branch(request.model, request.graph, keep, request.inputs)
    if place:
        raise NotSupported(
            "the cuts of this model are right on one side of a branch on a value only",
            f"on the other side of {place} the smaller model is another one",
            "prune less of it: skip=, only=",
        )


def _added(asked: Request, request: Request) -> Iterator[str]:
    """What joined the request while it was planned."""
    for other in request.others[len(asked.others) :]:
        yield f"traced on an input of {shape_text(other)} too, where cuts are wrong that are right on the example"
    if request.recipe.round_to != asked.recipe.round_to:
        yield f"widths are multiples of {request.recipe.round_to}: the configuration of the model refuses others"


@dataclass(frozen=True)
class _Scored:
    """Groups with their scores, what is kept whatever the budget, and what takes no part."""

    groups: list[GroupScores]
    decided: Keep
    frozen: list[Frozen]

    def without(self, faults: Mapping[str, str], kind: ReasonKind) -> _Scored:
        """These groups set aside, each with its reason."""
        wrong = [set_aside(group, faults[group.name], kind) for group, _ in self.groups if group.name in faults]
        left = [(group, scores) for group, scores in self.groups if group.name not in faults]
        return _Scored(left, self.decided, [*self.frozen, *wrong])


def _scored(request: Request) -> _Scored:
    groups, frozen = eligible_groups(request)
    decided = kept_tokens(request, groups)
    scored, frozen = score_groups(request, [group for group in groups if group.kind != "vocabulary"], frozen)
    return _Scored(scored, decided, frozen)


def _plan_of(request: Request, keep: Keep, frozen: list[Frozen]) -> Plan:
    made = Plan.of_structure(
        request.graph,
        keep,
        inputs=request.examples,
        frozen=frozen,
        recipe=request.recipe.describe(),
        target=request.target,
    )
    if not isinstance(request.target, Latency):
        return made
    timing, line = request.probe.measured(request.target, keep)
    before, after = replace(made.before, latency=timing.dense), replace(made.after, latency=timing.small)
    return replace(made, before=before, after=after, remarks=(*made.remarks, line))


def _described(request: Request, scored: _Scored) -> tuple[Request, Keep, list[Frozen]]:
    """The proven cut, and with `equal_widths` one that a configuration describes.

    Widths that the configuration refuses are rounded; units for which it has no word are set aside.
    """
    builds, faults = Builds(request.model), dict[str, str]()
    while True:
        try:
            keep, scored = _proven(request, scored)
        except (TargetMissed, NotSupported) as error:
            if not faults:
                raise
            raise type(error)(error.what, error.why, f"{_UNEVEN}; or {error.todo}") from error
        misfit = undescribed(builds, request.graph, keep, request.inputs) if request.recipe.equal_widths else None
        if misfit is None:
            return request, keep, scored.frozen
        rounded, misfit = _rounded(request, scored, builds, misfit)
        faults = {} if rounded else parts_at_fault(builds, request.graph, keep, request.inputs)
        if not rounded and not faults:
            todo = f"{_UNEVEN}; or prune other units: granularity=, only="
            raise NotSupported("plain from_pretrained would not read these widths", misfit.why, todo)
        request = rounded or request
        scored = scored.without({name: f"equal_widths: {why}" for name, why in faults.items()}, ReasonKind.REQUEST)


_UNEVEN = "leave equal_widths out: prunella.load reads any widths"


def _rounded(request: Request, scored: _Scored, builds: Builds, misfit: Misfit) -> tuple[Request | None, Misfit]:
    """The request with the smallest rounding of widths that is described, if one of a few is; else what is wrong."""
    for step in (2, 4, 8, 16):
        round_to = math.lcm(request.recipe.round_to, step)
        if not misfit.refused or round_to == request.recipe.round_to:
            continue
        rounded = replace(request, recipe=replace(request.recipe, round_to=round_to))
        try:
            keep = _kept_units(rounded, scored)
        except TargetMissed:
            break
        found = undescribed(builds, request.graph, keep, request.inputs)
        if found is None:
            return rounded, misfit
        misfit = found
    return None, misfit


def _proven(request: Request, scored: _Scored) -> tuple[Keep, _Scored]:
    """What is kept of each group, such that the oracle proves every cut; and what takes part by then."""
    while True:
        keep = _kept_units(request, scored)
        faults = unproven(request.model, request.graph, keep, request.inputs, request.others)
        if not faults:
            return keep, scored
        decided = scored.decided
        if faults.keys() <= decided.keys():
            why = next(faults[name] for name in decided if name in faults)
            raise NotSupported("tokens cannot be removed from this model", why, "leave Vocabulary out")
        scored = scored.without(faults, ReasonKind.UNPROVEN)
        if not scored.groups and not decided:
            raise nothing_to_prune(request, "units", scored.frozen)


def _kept_units(request: Request, units: _Scored) -> Keep:
    recipe, scored, decided, frozen = request.recipe, units.groups, units.decided, units.frozen
    if not scored and all(isinstance(entry, Vocabulary) for entry in recipe.granularities):
        return dict(decided)
    if not scored:
        raise nothing_to_prune(request, "units", frozen)
    assert request.target is not None, "checked at the start"
    groups, scores = tuple(group for group, _ in scored), tuple(values for _, values in scored)
    candidates = CandidateUnits(request.graph, groups, scores, request.target, decided, request.probe)
    rules = BudgetRules(
        recipe.allocation,
        recipe.min_density,
        round_to=tuple(math.lcm(g.multiple, recipe.round_to if g.kind in ("channel", "width") else 1) for g in groups),
        min_units=tuple(group.min_units for group in groups),
        equal_widths=recipe.equal_widths,
        allow_unchanged=bool(decided),
    )
    return candidates.keep(allocate_budget(candidates, request.target, rules, frozen, request.graph))


# -- masks -------------------------------------------------------------------------------------------------------


def plan_masks(request: Request) -> Plan:
    """A plan that zeroes weights."""
    layers, frozen = eligible_layers(request)
    scored, frozen = score_layers(request, layers, frozen)
    pattern = request.recipe.granularities[0]
    weights = Subject(request.model, request.graph).parameters
    matrices = zip(scored, _matrices(request, scored, frozen), strict=True)
    masks = {x.entity: from_matrix(matrix, weights[x.entity], x) for (x, _), matrix in matrices}
    return Plan.of_masks(
        request.graph,
        masks,
        pattern=pattern_name(pattern),
        inputs=request.inputs,
        frozen=frozen,
        recipe=request.recipe.describe(),
        target=request.target,
    )


def _matrices(request: Request, scored: Sequence[LayerScores], frozen: Sequence[Frozen]) -> list[Mask]:
    """The mask of every layer as a matrix `(out, in)`."""
    recipe, pattern = request.recipe, request.recipe.granularities[0]
    layers, scores = tuple(layer for layer, _ in scored), tuple(values for _, values in scored)
    if isinstance(pattern, Fixed):
        return fixed_masks(pattern, request.graph, layers, scores)
    assert isinstance(pattern, Competing) and request.target is not None, "checked at the start"
    candidates = CandidateWeights(request.graph, layers, scores, pattern)
    rules = BudgetRules(
        recipe.allocation,
        recipe.min_density,
        round_to=(1,) * len(layers),
        min_units=(recipe.min_units,) * len(layers),
        equal_widths=recipe.equal_widths,
        allow_unchanged=request.before is not None,
    )
    return candidates.masks(allocate_budget(candidates, request.target, rules, frozen, request.graph))
