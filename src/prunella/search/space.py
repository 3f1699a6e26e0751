"""What a search may cut: the groups of a model in the order of their scores, cut for real, and weighed."""

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
from prunella.model.unwrap import unwrap
from prunella.planning.budget import Ladder, ladder, most, solve
from prunella.planning.candidates import CandidateUnits, CandidateWeights
from prunella.planning.recipe import Recipe
from prunella.planning.request import Request, eligible_groups, eligible_layers, prepare, score_groups, score_layers
from prunella.selection import Counts
from prunella.stats import Source, Subject
from prunella.targets import Latency, Target
from prunella.types import Inputs, Loss

Evaluate = Callable[[nn.Module], float]
"""Quality of a model; higher is better."""
Predict = Callable[[Counts], float]
Candidates = CandidateUnits | CandidateWeights


@dataclass(frozen=True)
class Found:
    """What a search found. shares: group -> fraction of its units removed; `allocation` puts them into a `Recipe`.

    value: quality that the search saw.  cost: what remains, in the target's unit.  tried: evaluations in this process.
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


@dataclass(frozen=True)
class Space:
    """Groups that may be cut, by the scores of a recipe. `counts` below are units removed from each, in order."""

    model: nn.Module
    recipe: Recipe
    candidates: Candidates
    inputs: Inputs
    source: Source
    skip: tuple[str, ...]
    only: tuple[str, ...]

    @cached_property
    def ladders(self) -> tuple[Ladder, ...]:
        """The steps that min_density, round_to and the operations leave to each group."""
        ranks = (torch.arange(size, dtype=torch.float64) for size in self.sizes)
        return tuple(self._ladder(index, keys) for index, keys in enumerate(ranks))

    @property
    def names(self) -> tuple[str, ...]:
        """The groups."""
        return tuple(pool.name for pool in self.candidates.pools)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Units of each."""
        return tuple(pool.size for pool in self.candidates.pools)

    @cached_property
    def identity(self) -> Identity:
        """What decides the quality of a cut, but for the function that says it: model, recipe, data and groups."""
        groups = list(zip(self.names, self.sizes, strict=True))
        data = {"data": self.source.data, "loss": self.source.loss, "inputs": self.inputs}
        return identify({**model_parts(self.model), "recipe": self.recipe, **data, "groups": groups})

    def cut(self, counts: Counts) -> nn.Module:
        """A copy of the model with these units really cut away, or these weights zeroed under masks."""
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
        """The quality of the cut model in eval mode, every random generator at the recipe's seed."""
        small = self.cut(counts)
        with untouched(small, self.recipe.seed), mode(small, training=False):
            return float(evaluate(small))

    def cost(self, target: Target, counts: Counts) -> float:
        """What remains, in the target's unit; a `Latency` is measured, in milliseconds."""
        candidates = self.candidates
        if isinstance(target, Latency) and isinstance(candidates, CandidateUnits) and candidates.probe is not None:
            return candidates.probe.time(target, candidates.keep(counts)).small
        return candidates.amount(target, counts)

    def budget(self, target: Target, predict: Predict | None = None) -> float:
        """The most that meets the target."""
        if predict is not None or isinstance(target, Latency):
            dense = (predict or partial(self.cost, target))((0,) * len(self.sizes))
            return target.absolute(dense)
        return self.candidates.budget(target)

    def removed(self, shares: Mapping[str, float]) -> Counts:
        """The steps nearest to these fractions, on the ladders that min_density and round_to leave."""
        wanted = [round(shares.get(name, 0.0) * size) for name, size in zip(self.names, self.sizes, strict=True)]
        levels = [self.levels(index) for index in range(len(wanted))]
        return tuple(min(level, key=lambda c: (abs(c - want), c)) for level, want in zip(levels, wanted, strict=True))

    def levels(self, index: int) -> list[int]:
        """How many units may be removed from one group: 0 and every step of its ladder."""
        steps = self.ladders[index]
        return [steps.removed(step) for step in range(len(steps.keys) + 1)]

    def shares(self, counts: Counts) -> dict[str, float]:
        """As fractions."""
        return {name: gone / size for name, gone, size in zip(self.names, counts, self.sizes, strict=True)}

    def scaled(self, shares: Mapping[str, float], target: Target, predict: Predict | None = None) -> Counts | None:
        """These shares times the factor that meets the target, as `fixed` will do in the plan; None if none does."""
        cost = predict or partial(self.cost, target)
        budget = self.budget(target, predict) * (1 + 1e-12)
        keys = fixed(self.candidates.pools, shares=shares)
        rungs = [self._ladder(index, key) for index, key in enumerate(keys)]
        if cost(most(rungs)) > budget:
            return None
        return solve(rungs, lambda gone: cost(gone) <= budget)

    def of(self, small: nn.Module) -> Space:
        """The space of a model that was cut from this one: the same groups, narrower, with scores of its weights."""
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
    """The groups that `recipe` may cut, scored once; its allocation is what is searched and plays no part here.

    Parameters and errors are those of `plan`. The model is only read. Units of structure, or weights under a mask;
    patterns of fixed sparsity, blocks and tokens have nothing to search.
    """
    model = unwrap(model)
    searched = Channel | Head | Width | Expert | Element | Block
    odd = next((entry for entry in recipe.granularities if not isinstance(entry, searched)), None)
    if odd is not None:
        why = "it leaves no choice of how many, or takes whole blocks of layers"
        raise RequestError(f"there is nothing to search for {odd}", why, "Channel, Head, Width, Expert, Element, Block")
    with untouched(model, recipe.seed):
        request = prepare(model, inputs, recipe, target=None, source=Source(data, loss), skip=skip, only=only)
        pattern = recipe.granularities[0]
        candidates: Candidates
        candidates = _weights(request, pattern) if isinstance(pattern, Element | Block) else _units(request)
    return Space(model, recipe, candidates, inputs, request.source, request.skip, request.only)


def _units(request: Request) -> CandidateUnits:
    scored, _ = score_groups(request, *eligible_groups(request))
    half = {g.name: torch.arange(g.size) >= min(g.size // 2, g.size - max(1, g.min_units)) for g, _ in scored}
    faults = unproven(request.model, request.graph, half, request.inputs)
    scored = [(group, scores) for group, scores in scored if group.name not in faults]
    if not scored:
        raise NotSupported("there is nothing to search", next(iter(faults.values())), "`prunella inspect` shows why")
    groups, scores = tuple(group for group, _ in scored), tuple(values for _, values in scored)
    return CandidateUnits(request.graph, groups, scores, probe=request.probe)


def _weights(request: Request, pattern: Element | Block) -> CandidateWeights:
    scored, _ = score_layers(request, *eligible_layers(request))
    return CandidateWeights(request.graph, tuple(x for x, _ in scored), tuple(s for _, s in scored), pattern)


def _limits(candidates: Candidates, recipe: Recipe, index: int) -> tuple[int, int]:
    """Width multiple and smallest width of one group, as in a plan."""
    if isinstance(candidates, CandidateWeights):
        return 1, 1
    group = candidates.groups[index]
    round_to = recipe.round_to if group.kind in ("channel", "width") else 1
    return math.lcm(group.multiple, round_to), group.min_units
