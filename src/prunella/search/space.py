"""The search space: the prunable groups of a model by their scores, with pruned copies and costs for any choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from prunella.allocation import fixed
from prunella.allocation.pool import Allocation
from prunella.errors import NotSupported, RequestError
from prunella.granularity import Block, Channel, Element, Expert, Head, Width
from prunella.graph.cut.changes import changes
from prunella.graph.cut.surgery import change_
from prunella.graph.matrix import from_matrix
from prunella.graph.verify import unproven
from prunella.io.identity import Identity, identify, model_parts
from prunella.model.copying import copied
from prunella.model.masks import record_
from prunella.model.state import mode, untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.model.user_code import quality_of
from prunella.planning.budget import Ladder, ladder, most, solve
from prunella.planning.candidates import CandidateUnits, CandidateWeights
from prunella.planning.recipe import Recipe
from prunella.planning.request import (
    Request,
    eligible_groups,
    eligible_layers,
    prepare,
    score_groups,
    score_layers,
)
from prunella.planning.widened import widened, with_tried
from prunella.selection import Counts
from prunella.stats import Source, Subject
from prunella.targets import Latency, Target
from prunella.types import Inputs, Loss

Evaluate = Callable[[nn.Module], float]
"""Quality of a model; higher is better."""
Predict = Callable[[Counts], float]
Candidates = CandidateUnits | CandidateWeights


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. shares: group -> fraction of its units removed; `allocation` is for a `Recipe`.

    value: quality in the search.  cost: remaining cost, in the target's unit.  tried: evaluations in this process.
    model: the tuned model of a search that tunes, else None.
    """

    shares: Mapping[str, float]
    value: float
    cost: float
    tried: int
    model: nn.Module | None = None

    @property
    def allocation(self) -> Allocation:
        """`fixed` with these shares."""
        return partial(fixed, shares=dict(self.shares))


def evaluated(model: nn.Module, evaluate: Evaluate, seed: int, *, cut: str = "") -> float:
    """The quality of a model in evaluation mode, with all random generators at the seed. cut: what was cut of it.

    Errors: those of `prunella.model.user_code.quality_of`.
    """
    with untouched(model, seed), mode(model, training=False):
        value = evaluate(model)
    return quality_of(value, "evaluate=", cut or "the dense model", dense=not cut)


@dataclass(frozen=True)
class Space:
    """The prunable groups, by the scores of a recipe. `counts` are the numbers of removed units of all groups."""

    model: nn.Module
    recipe: Recipe
    candidates: Candidates
    inputs: Inputs
    source: Source
    skip: tuple[str, ...]
    only: tuple[str, ...]

    @cached_property
    def ladders(self) -> tuple[Ladder, ...]:
        """The steps of each group that min_density, round_to and the operations allow."""
        ranks = (torch.arange(size, dtype=torch.float64, device="cpu") for size in self.sizes)
        return tuple(self._ladder(index, keys) for index, keys in enumerate(ranks))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(pool.name for pool in self.candidates.pools)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of units of each group."""
        return tuple(pool.size for pool in self.candidates.pools)

    @cached_property
    def identity(self) -> Identity:
        """Everything that determines the quality of a choice except the evaluation: model, recipe, data and groups."""
        groups = list(zip(self.names, self.sizes, strict=True))
        data = {"data": self.source.data, "loss": self.source.loss, "inputs": self.inputs}
        return identify({**model_parts(self.model), "recipe": self.recipe, **data, "groups": groups})

    def cut(self, counts: Counts) -> nn.Module:
        """A copy of the model without these units, or with these weights zeroed under masks."""
        small = copied(self.model)
        if isinstance(self.candidates, CandidateUnits):
            change_(small, changes(self.candidates.graph, self.candidates.keep(counts)))
            return small
        parameters = Subject(small, self.candidates.graph).parameters
        for layer, matrix in zip(self.candidates.layers, self.candidates.masks(counts), strict=True):
            parameter = parameters[layer.entity]
            assert isinstance(parameter, nn.Parameter)
            mask = from_matrix(matrix, parameter, layer)
            with torch.no_grad():
                parameter.masked_fill_(~mask, 0)
            record_(small, {parameter: mask})
        return small

    def evaluate(self, evaluate: Evaluate, counts: Counts) -> float:
        """The quality of the pruned model in evaluation mode, with all random generators at the recipe's seed."""
        cut = {name: count for name, count in zip(self.names, counts, strict=True) if count}
        of = ", ".join(f"{name} without {count} units" for name, count in list(cut.items())[:3])
        return evaluated(self.cut(counts), evaluate, self.recipe.seed, cut=f"the model with {of}" if cut else "")

    def cost(self, target: Target, counts: Counts) -> float:
        """The remaining cost, in the target's unit; a `Latency` is measured, in milliseconds."""
        candidates = self.candidates
        if isinstance(target, Latency) and isinstance(candidates, CandidateUnits) and candidates.probe is not None:
            return candidates.probe.time(target, candidates.keep(counts)).small
        return candidates.amount(target, counts)

    def budget(self, target: Target, predict: Predict | None = None) -> float:
        """The largest cost that meets the target."""
        if predict is not None or isinstance(target, Latency):
            dense = (predict or partial(self.cost, target))((0,) * len(self.sizes))
            return target.absolute(dense)
        return self.candidates.budget(target)

    def removed(self, shares: Mapping[str, float]) -> Counts:
        """The steps nearest to these fractions, on the ladders that min_density and round_to allow."""
        goals = [round(shares.get(name, 0.0) * size) for name, size in zip(self.names, self.sizes, strict=True)]
        levels = [self.levels(index) for index in range(len(goals))]
        return tuple(min(level, key=lambda c: (abs(c - goal), c)) for level, goal in zip(levels, goals, strict=True))

    def levels(self, index: int) -> list[int]:
        """The possible numbers of removed units of one group: 0 and every step of its ladder."""
        steps = self.ladders[index]
        return [steps.removed(step) for step in range(len(steps.keys) + 1)]

    def shares(self, counts: Counts) -> dict[str, float]:
        """Group -> removed fraction, for these counts."""
        return {name: removed / size for name, removed, size in zip(self.names, counts, self.sizes, strict=True)}

    def scaled(self, shares: Mapping[str, float], target: Target, predict: Predict | None = None) -> Counts | None:
        """These shares times the factor that meets the target, as `fixed` does in the plan; None if no factor does."""
        cost = predict or partial(self.cost, target)
        budget = self.budget(target, predict) * (1 + 1e-12)
        keys = fixed(self.candidates.pools, shares=shares)
        rungs = [self._ladder(index, key) for index, key in enumerate(keys)]
        if cost(most(rungs)) > budget:
            return None
        return solve(rungs, lambda counts: cost(counts) <= budget)

    def of(self, small: nn.Module) -> Space:
        """The space of a model that `cut` made: the same groups with fewer units, scored by its weights."""
        return space(
            small,
            self.inputs,
            self.recipe,
            data=self.source.data,
            loss=self.source.loss,
            skip=self.skip,
            only=self.only,
        )

    def _ladder(self, index: int, keys: torch.Tensor) -> Ladder:
        round_to, min_units = _limits(self.candidates, self.recipe, index)
        return ladder(keys, self.recipe.min_density, round_to, min_units)


def space(
    model: nn.Module,
    inputs: Inputs,
    recipe: Recipe,
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Space:
    """The groups that `recipe` may prune, scored once; the search replaces the allocation of the recipe.

    Parameters and errors are those of `plan`. The model does not change. Units are structures, or weights under a mask;
    patterns of fixed sparsity, blocks and tokens have no choice to search.
    Errors: RequestError for a granularity without a choice, NotSupported if nothing can be pruned.
    """
    model = with_plain_weights(model)
    searched = Channel | Head | Width | Expert | Element | Block
    unsearchable = next((entry for entry in recipe.granularities if not isinstance(entry, searched)), None)
    if unsearchable is not None:
        why = "it has a fixed sparsity, or removes whole blocks of layers"
        raise RequestError(
            f"there is nothing to search for {unsearchable}", why, "Channel, Head, Width, Expert, Element, Block"
        )
    with untouched(model, recipe.seed):
        request = prepare(model, inputs, recipe, target=None, source=Source(data, loss), skip=skip, only=only)
        pattern = recipe.granularities[0]
        candidates: Candidates
        candidates = _weights(request, pattern) if isinstance(pattern, Element | Block) else _units(with_tried(request))
    return Space(model, recipe, candidates, inputs, request.source, request.skip, request.only)


def _units(request: Request) -> CandidateUnits:
    scored, _ = score_groups(request, *eligible_groups(request))
    half = {
        g.name: torch.arange(g.size, device="cpu") >= min(g.size // 2, g.size - max(1, g.min_units)) for g, _ in scored
    }
    faults = unproven(request.model, request.graph, half, request.inputs, request.others)
    proven = {name: mask for name, mask in half.items() if name not in faults}
    wider = widened(request, proven).request
    if wider is not None:
        return _units(wider)
    scored = [(group, scores) for group, scores in scored if group.name not in faults]
    if not scored:
        raise NotSupported("there is nothing to search", next(iter(faults.values())), "`prunella inspect` shows why")
    groups, scores = tuple(group for group, _ in scored), tuple(values for _, values in scored)
    return CandidateUnits(request.graph, groups, scores, probe=request.probe)


def _weights(request: Request, pattern: Element | Block) -> CandidateWeights:
    scored, _ = score_layers(request, *eligible_layers(request))
    return CandidateWeights(request.graph, tuple(x for x, _ in scored), tuple(s for _, s in scored), pattern)


def _limits(candidates: Candidates, recipe: Recipe, index: int) -> tuple[int, int]:
    """Width multiple and minimum width of one group, as in a plan."""
    if isinstance(candidates, CandidateWeights):
        return 1, 1
    group = candidates.groups[index]
    round_to = recipe.round_to if group.kind in ("channel", "width") else 1
    return math.lcm(group.multiple, round_to), group.min_units
