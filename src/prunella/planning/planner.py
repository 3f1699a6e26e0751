"""The whole pipeline: model -> graph -> groups -> criterion -> allocation -> keep and masks. Read this file first.

`plan()` only reads the model. `prunella.apply_` zeroes in place, `prunella.shrink` builds the smaller module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from prunella.errors import NotSupported
from prunella.granularity import Competing, Fixed, Structural, Vocabulary
from prunella.graph.data import Frozen, ReasonKind
from prunella.graph.matrix import from_matrix
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
from prunella.planning.checks import check_finite, checked_target
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.planning.request import (
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
)
from prunella.stats import Source, Subject
from prunella.targets import Latency, Target
from prunella.types import Inputs, Keep, Loss, Mask

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

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.5))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '8 of 16'}
    """
    model = with_plain_weights(model)
    target = checked_target(recipe.granularities, target)
    check_finite(model)
    with untouched(model, recipe.seed):
        request = prepare(model, inputs, recipe, target=target, source=Source(data, loss), skip=skip, only=only)
        structural = isinstance(recipe.granularities[0], Structural)
        return plan_structure(request) if structural else plan_masks(request)


# -- structure ---------------------------------------------------------------------------------------------------


def plan_structure(request: Request) -> Plan:
    """A plan that removes units; a group whose cut the oracle cannot prove is set aside with the reason."""
    groups, frozen = eligible_groups(request)
    decided = kept_tokens(request, groups)
    scored, frozen = score_groups(request, [group for group in groups if group.kind != "vocabulary"], frozen)
    keep, frozen = _proven(request, scored, decided, frozen)
    made = Plan.of_structure(
        request.graph,
        keep,
        inputs=request.inputs,
        frozen=frozen,
        recipe=request.recipe.describe(),
        target=request.target,
    )
    if not isinstance(request.target, Latency):
        return made
    timing, line = request.probe.measured(request.target, keep)
    before, after = replace(made.before, latency=timing.dense), replace(made.after, latency=timing.small)
    return replace(made, before=before, after=after, remarks=(*made.remarks, line))


def _proven(
    request: Request, scored: list[GroupScores], decided: Keep, frozen: list[Frozen]
) -> tuple[Keep, list[Frozen]]:
    """What is kept of each group, such that the oracle proves every cut; and all that is frozen by then."""
    while True:
        keep = _kept_units(request, scored, decided, frozen)
        faults = unproven(request.model, request.graph, keep, request.inputs)
        if not faults:
            return keep, frozen
        if faults.keys() <= decided.keys():
            why = next(faults[name] for name in decided if name in faults)
            raise NotSupported("tokens cannot be removed from this model", why, "leave Vocabulary out")
        wrong = [group for group, _ in scored if group.name in faults]
        frozen = [*frozen, *(set_aside(group, faults[group.name], ReasonKind.UNPROVEN) for group in wrong)]
        scored = [(group, scores) for group, scores in scored if group.name not in faults]
        if not scored and not decided:
            raise nothing_to_prune(request, "units", frozen)


def _kept_units(request: Request, scored: Sequence[GroupScores], decided: Keep, frozen: Sequence[Frozen]) -> Keep:
    recipe = request.recipe
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
