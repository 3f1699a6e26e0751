"""Plans of masks: scores of weights, and choices by hand, determine the zeroed weights of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import Competing, Fixed
from prunella.graph.data import Frozen, Layer
from prunella.graph.matrix import from_matrix
from prunella.planning.accounting import pattern_name
from prunella.planning.budget import ladder
from prunella.planning.by_hand import Quota, masks_by_hand, quotas_of_layers, steps_for
from prunella.planning.candidates import BudgetRules, CandidateWeights, allocate_budget, fixed_masks
from prunella.planning.plan import Plan
from prunella.planning.request import LayerScores, Request, eligible_layers, score_layers
from prunella.planning.threshold import weights_below
from prunella.selection import Counts
from prunella.stats import Subject
from prunella.targets import Threshold
from prunella.types import Mask


def masked_plan(request: Request) -> Plan:
    """A plan that zeroes weights."""
    layers, frozen = eligible_layers(request)
    by_hand, pattern = request.by_hand, request.recipe.granularities[0]
    masks = masks_by_hand(by_hand, request.graph, layers, frozen)
    quotas = quotas_of_layers(by_hand, request.graph, layers, frozen)
    layers = [x for x in layers if x.entity not in masks and (x.entity in quotas or request.target or not by_hand)]
    if layers or not masks:
        scored, frozen = score_layers(request, layers, frozen)
        weights = Subject(request.model, request.graph).parameters
        matrices = _matrices(request, scored, frozen, quotas)
        masks |= {x.entity: from_matrix(matrices[x.entity], weights[x.entity], x) for x, _ in scored}
    return Plan.of_masks(
        request.graph,
        masks,
        pattern=pattern_name(pattern),
        inputs=request.inputs,
        frozen=frozen,
        recipe=request.describe(),
        target=request.target,
    )


def _matrices(
    request: Request, scored: Sequence[LayerScores], frozen: Sequence[Frozen], quotas: Mapping[str, Quota]
) -> dict[str, Mask]:
    """Entity -> the mask of its layer as a matrix `(out, in)`. quotas: of layers that are decided by hand."""
    recipe, pattern = request.recipe, request.recipe.granularities[0]
    if isinstance(pattern, Fixed):
        if quotas:
            raise RequestError(f"{pattern.title} has its own ratio", "2 of 4 are kept", "leave ratios= and counts= out")
        masks = fixed_masks(pattern, request.graph, [x for x, _ in scored], [values for _, values in scored])
        return {layer.entity: mask for (layer, _), mask in zip(scored, masks, strict=True)}
    assert isinstance(pattern, Competing), "checked at the start"
    alone = [pair for pair in scored if pair[0].entity in quotas]
    decided = {x.entity: _fewer_weights(request, x, scores, pattern, quotas[x.entity]) for x, scores in alone}
    competing = [pair for pair in scored if pair[0].entity not in quotas]
    if not competing:
        return decided
    layers, scores = tuple(layer for layer, _ in competing), tuple(values for _, values in competing)
    candidates = CandidateWeights(request.graph, layers, scores, pattern)
    if isinstance(request.target, Threshold):
        steps = [ladder(pool.scores.double(), recipe.min_density, 1, recipe.min_units) for pool in candidates.pools]
        counts = weights_below(request.target, candidates.pools, steps, first=request.before is None)
    else:
        counts = _weights_of_budget(request, candidates, frozen)
    return decided | {layer.entity: mask for layer, mask in zip(layers, candidates.masks(counts), strict=True)}


def _weights_of_budget(request: Request, candidates: CandidateWeights, frozen: Sequence[Frozen]) -> Counts:
    """The number of weights that each layer loses to meet the target."""
    assert request.target is not None, "checked at the start"
    recipe, number = request.recipe, len(candidates.layers)
    rules = BudgetRules(
        recipe.allocation,
        recipe.min_density,
        round_to=(1,) * number,
        min_units=(recipe.min_units,) * number,
        equal_widths=recipe.equal_widths,
        allow_unchanged=request.before is not None or bool(request.by_hand),
    )
    return allocate_budget(candidates, request.target, rules, frozen, request.graph)


def _fewer_weights(request: Request, layer: Layer, scores: Tensor, pattern: Competing, quota: Quota) -> Mask:
    """The mask of a layer for its quota, lowest scores removed first."""
    candidates = CandidateWeights(request.graph, (layer,), (scores,), pattern)
    pool, recipe = candidates.pools[0], request.recipe
    steps = ladder(pool.scores.double(), recipe.min_density, 1, recipe.min_units)
    return candidates.masks((steps_for(layer.name, steps, quota, pool.size),))[0]
