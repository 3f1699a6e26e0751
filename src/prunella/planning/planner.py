"""The full pipeline: model -> graph -> groups -> criterion -> allocation -> keep and masks. Read this file first.

`plan()` only reads the model. `prunella.apply_` zeroes in place, `prunella.shrink` builds the smaller module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError, TargetMissed
from prunella.granularity import Structural, Vocabulary
from prunella.graph.data import Frozen, Group, ReasonKind
from prunella.graph.other_sizes import wrong_branch
from prunella.graph.resized import batch_text
from prunella.graph.verify import unproven
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.budget import Ladder, ladder
from prunella.planning.by_hand import (
    NOTHING,
    ByHand,
    Positions,
    Quota,
    check_beside,
    kept_by_position,
    quotas_of_groups,
    steps_for,
)
from prunella.planning.candidates import (
    BudgetRules,
    CandidateUnits,
    allocate_budget,
)
from prunella.planning.checks import check_finite, check_threshold, checked_target, foreign_weights, small_number
from prunella.planning.loadable import KeptUnits, Loadable, costs_of_reading, read_by
from prunella.planning.masked_plan import masked_plan
from prunella.planning.plan import Plan
from prunella.planning.readable import Builds, Misfit, groups_at_fault, readers, undescribed
from prunella.planning.recipe import Recipe
from prunella.planning.request import (
    GroupScores,
    Request,
    eligible_groups,
    kept_tokens,
    nothing_to_prune,
    prepare,
    score_groups,
    set_aside,
)
from prunella.planning.threshold import units_above
from prunella.planning.widened import argument_remarks, widened, with_tried
from prunella.selection import without_lowest
from prunella.stats import Source
from prunella.targets import Latency, Target, Threshold
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
    remove: Mapping[str, Positions] = NOTHING,
    keep: Mapping[str, Positions] = NOTHING,
    ratios: Mapping[str, float] = NOTHING,
    counts: Mapping[str, int] = NOTHING,
    loadable: Loadable | None = None,
) -> Plan:
    """Plan what to remove from `model` to meet `target`. Neither the model nor the random state changes.

    inputs: an example batch: a tensor, a tuple of arguments or a mapping of keywords; multiply-adds are of this batch.
        `prunella.Examples` holds several, for models with other branches at other sizes.
    recipe: how to prune; default: `Recipe()`.
    target: `Sparsity`, `Params`, `MACs`, `Bytes`, `Latency` or `Threshold`. It is optional for `NM`, which has a fixed
        sparsity, for `Vocabulary`, and with a choice by hand.
    data, loss: batches, and a function of (model, batch), for criteria that need them. Without a loss a batch is passed
        as a mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`. The model runs in eval mode.
    skip, only: patterns (`fnmatch`) for names of groups, parameters or modules; a module matches everything inside it.
    remove, keep: layer -> output channels to remove, or the only ones to keep, as indices or a bool mask. A unit is
        removed with all slices coupled to it. For heads, experts, blocks: indices of units. For masks: a bool tensor.
    ratios, counts: layer or pattern -> fraction, or number, of its units (weights) to remove, lowest scores first.
        A choice by hand is not changed to meet a target; without a target only the chosen units are removed.
    loadable: `"transformers"` allows only what plain `AutoModel.from_pretrained` reads; a remark says what that costs.

    Errors: RequestError (an invalid request), BadInput (broken weights, data or inputs), NotSupported (nothing can be
    pruned), TargetMissed (with the smallest reachable size and the obstacles).

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.5))
        >>> {name: f"{int(kept.sum())} of {len(kept)}" for name, kept in plan.keep.items()}
        {'0': '8 of 16'}
        >>> by_hand = pr.plan(model, torch.randn(2, 8), remove={"0": [2, 5, 7]})
        >>> pr.shrink(model, by_hand)[0].out_features
        13
    """
    _check_recipe(recipe)
    model, by_hand = with_plain_weights(model), ByHand(remove, keep, ratios, counts)
    free, recipe = recipe, read_by(recipe, model, loadable)
    target = None if target is None and by_hand else checked_target(recipe.granularities, target)
    check_threshold(target, equal_widths=recipe.equal_widths)
    structural = isinstance(recipe.granularities[0], Structural)
    check_beside(by_hand, target, masks=not structural)
    check_finite(model)
    with untouched(model, recipe.seed):
        source = Source(data, loss)
        request = prepare(model, inputs, recipe, target=target, source=source, skip=skip, only=only, by_hand=by_hand)
        costs = partial(costs_of_reading, free) if loadable is not None else no_costs
        plan = plan_structure(request, costs) if structural else masked_plan(request)
    return replace(plan, remarks=(*plan.remarks, *foreign_weights(model), *small_number(target)))


def _check_recipe(recipe: object) -> None:
    if not isinstance(recipe, Recipe):
        what = f"the recipe is a {type(recipe).__name__}"
        raise RequestError(what, "a criterion is a part of a recipe", "Recipe(criterion=...)")


# -- structure ---------------------------------------------------------------------------------------------------


def _units_kept(scored: _Scored, request: Request) -> Keep:
    return _kept_units(request, scored)


Costs = Callable[[Request, Sequence[GroupScores], Keep, KeptUnits], Sequence[str]]
"""What to say of a choice: the request, the groups with their scores, what is kept, and how that is chosen."""


def no_costs(request: Request, scored: Sequence[GroupScores], keep: Keep, choose: KeptUnits) -> Sequence[str]:
    """Nothing to say."""
    return ()


def plan_structure(request: Request, costs: Costs = no_costs) -> Plan:
    """A plan that removes units; a group whose cut the oracle cannot prove is set aside with the reason.

    An input of another size, or with other arguments, on which the cut is wrong is traced too: it shows what is coupled
    or frozen there.
    """
    original, request = request, with_tried(request)
    while True:
        scored = _scored(request)
        request, keep, frozen = _described(request, scored)
        wider = widened(request, keep, given=len(original.others))
        if not wider.wrong:
            _check_branches(request, keep)
            said = costs(original, scored.groups, keep, partial(_units_kept, scored))
            remarks = (*_added(original, request), *argument_remarks(request, wider.check), *said)
            plan = _plan_of(request, keep, frozen)
            return replace(plan, remarks=(*plan.remarks, *remarks))
        if wider.request is None:
            raise NotSupported(
                "the cuts of this model are exact for the size of the example only",
                f"{wider.wrong} the smaller model is wrong, also after tracing that input",
                "prune less of it: skip=, only=",
            )
        request = wider.request


def _check_branches(request: Request, keep: Keep) -> None:
    """Errors: NotSupported if the cut is wrong on the other side of a branch on a value, or on a further call."""
    run = wrong_branch(request.model, request.graph, keep, request.inputs)
    if run:
        raise NotSupported(
            "the cuts of this model are exact for one run only",
            f"{run} the smaller model is wrong",
            "prune less of it: skip=, only=",
        )


def _added(asked: Request, request: Request) -> Iterator[str]:
    """Remarks on the examples and roundings that were added during planning."""
    for other in request.others[len(asked.others) :]:
        yield f"also traced on {batch_text(other, request.inputs)}, where cuts that are exact on the example are wrong"
    if request.recipe.round_to != asked.recipe.round_to:
        yield f"widths are multiples of {request.recipe.round_to}: the configuration of the model refuses others"


@dataclass(frozen=True)
class _Scored:
    """Groups with their scores, the units kept regardless of the budget, and the frozen axes."""

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
    by_hand = request.by_hand
    decided = kept_tokens(request, groups) | kept_by_position(
        by_hand, request.graph, groups, frozen, _hidden_sizes(request.model)
    )
    quotas = quotas_of_groups(by_hand, request.graph, groups, frozen)
    units = [group for group in groups if group.kind != "vocabulary" and group.name not in decided]
    some = [group for group in units if group.name in quotas] if request.target is None and by_hand else units
    scored, frozen = score_groups(request, some, frozen)
    counted = [(group, scores) for group, scores in scored if group.name in quotas]
    decided |= {group.name: _fewer(request.recipe, group, scores, quotas[group.name]) for group, scores in counted}
    return _Scored([pair for pair in scored if pair[0].name not in quotas], decided, frozen)


def _hidden_sizes(model: nn.Module) -> dict[str, int]:
    """Recurrent layer -> its hidden size."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    return {name: module.hidden_size for name, module in model.named_modules() if isinstance(module, kinds)}


def _fewer(recipe: Recipe, group: Group, scores: Tensor, quota: Quota) -> Mask:
    """The mask of a group that loses its quota, lowest scores first."""
    return without_lowest(scores, steps_for(group.name, _widths(recipe, group, scores), quota, group.size))


def _widths(recipe: Recipe, group: Group, scores: Tensor) -> Ladder:
    """The widths that a group may have."""
    return ladder(scores.sort().values.double(), recipe.min_density, _round_to(recipe, group), group.min_units)


def _round_to(recipe: Recipe, group: Group) -> int:
    return math.lcm(group.multiple, recipe.round_to if group.kind in ("channel", "width") else 1)


def _plan_of(request: Request, keep: Keep, frozen: list[Frozen]) -> Plan:
    plan = Plan.of_structure(
        request.graph,
        keep,
        inputs=request.examples,
        frozen=frozen,
        recipe=request.describe(),
        target=request.target,
    )
    if not isinstance(request.target, Latency):
        return plan
    timing, line = request.probe.measured(request.target, keep)
    before, after = replace(plan.before, latency=timing.dense), replace(plan.after, latency=timing.small)
    return replace(plan, before=before, after=after, remarks=(*plan.remarks, line))


def _described(request: Request, scored: _Scored) -> tuple[Request, Keep, list[Frozen]]:
    """The proven cut, and with `equal_widths` one that a configuration describes.

    Widths that the configuration refuses are rounded; units that it cannot express are set aside.
    """
    parts, faults = readers(request.model) if request.recipe.equal_widths else {}, dict[str, str]()
    while True:
        try:
            keep, scored = _proven(request, scored)
        except (TargetMissed, NotSupported) as error:
            if not faults:
                raise
            raise type(error)(error.what, error.why, f"{_UNEVEN}; or {error.todo}") from error
        misfit = undescribed(request.model, parts, request.graph, keep, request.inputs)
        if misfit is None:
            return request, keep, scored.frozen
        rounded, misfit = _rounded(request, scored, parts, misfit)
        faults = {} if rounded else groups_at_fault(request.model, parts, request.graph, keep, request.inputs)
        if not rounded and not faults:
            todo = f"{_UNEVEN}; or prune other units: granularity=, only="
            raise NotSupported("plain from_pretrained would not read these widths", misfit.why, todo)
        request = rounded or request
        scored = scored.without({name: f"equal_widths: {why}" for name, why in faults.items()}, ReasonKind.REQUEST)


_UNEVEN = "leave equal_widths out: prunella.load reads any widths"


def _rounded(
    request: Request, scored: _Scored, parts: Mapping[str, Builds], misfit: Misfit
) -> tuple[Request | None, Misfit]:
    """The request with the smallest rounding of widths that a configuration describes, or None and the misfit."""
    for step in (2, 4, 8, 16):
        round_to = math.lcm(request.recipe.round_to, step)
        if not misfit.refused or round_to == request.recipe.round_to:
            continue
        rounded = replace(request, recipe=replace(request.recipe, round_to=round_to))
        try:
            keep = _kept_units(rounded, scored)
        except TargetMissed:
            break
        unlike = undescribed(request.model, parts, request.graph, keep, request.inputs)
        if unlike is None:
            return rounded, misfit
        misfit = unlike
    return None, misfit


def _proven(request: Request, scored: _Scored) -> tuple[Keep, _Scored]:
    """The kept units of each group, such that the oracle proves every cut, and the groups that remain."""
    while True:
        keep = _kept_units(request, scored)
        faults = unproven(request.model, request.graph, keep, request.inputs, request.others)
        if not faults:
            return keep, scored
        decided = scored.decided
        if faults.keys() <= decided.keys():
            name, why = next((name, faults[name]) for name in decided if name in faults)
            if request.by_hand:
                raise NotSupported(
                    f"units of {name} cannot be removed", why, "leave it out; `prunella inspect` shows more"
                )
            raise NotSupported("tokens cannot be removed from this model", why, "leave Vocabulary out")
        scored = scored.without(faults, ReasonKind.UNPROVEN)
        if not scored.groups and not decided:
            raise nothing_to_prune(request, "units", scored.frozen)


def _kept_units(request: Request, units: _Scored) -> Keep:
    recipe, scored, decided, frozen = request.recipe, units.groups, units.decided, units.frozen
    vocabulary = all(isinstance(entry, Vocabulary) for entry in recipe.granularities)
    if not scored and (vocabulary or request.by_hand):
        return dict(decided)
    if not scored:
        raise nothing_to_prune(request, "units", frozen)
    assert request.target is not None, "checked at the start"
    if isinstance(request.target, Threshold):
        widths = [_widths(recipe, group, scores) for group, scores in scored]
        return {**decided, **units_above(request.target, scored, widths)}
    groups, scores = tuple(group for group, _ in scored), tuple(values for _, values in scored)
    candidates = CandidateUnits(request.graph, groups, scores, request.target, decided, request.probe)
    rules = BudgetRules(
        recipe.allocation,
        recipe.min_density,
        round_to=tuple(_round_to(recipe, group) for group in groups),
        min_units=tuple(group.min_units for group in groups),
        equal_widths=recipe.equal_widths,
        allow_unchanged=bool(decided),
    )
    return candidates.keep(allocate_budget(candidates, request.target, rules, frozen, request.graph))
