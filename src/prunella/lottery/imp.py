"""Iterative magnitude pruning: a function of (model, round) that returns the plan of each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from prunella.allocation.rounds import check_rates, densities, per_round
from prunella.criteria import magnitude
from prunella.granularity import Element
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import training
from prunella.targets import Sparsity
from prunella.types import Inputs

Prune = Callable[[nn.Module, int], Plan]
"""(trained model, number of the round from 1) -> plan of all weights removed so far, relative to the dense model."""


@dataclass(frozen=True)
class PruningRounds:
    """The result of `imp`: a function of a model and a round that returns the plan of this round."""

    inputs: Inputs
    rate: float
    last: float
    recipe: Recipe | None
    skip: tuple[str, ...]

    def __call__(self, model: nn.Module, number: int) -> Plan:
        if self.recipe is not None:
            target = Sparsity(1 - (1 - self.rate) ** number)
            return plan(model, self.inputs, self.recipe, target=target, skip=self.skip)
        recipe = Recipe(magnitude, Element(), partial(per_round, rate=self.rate, last=self.last))
        sizes = [row.total for row in plan(model, self.inputs, recipe, target=Sparsity(0.5), skip=self.skip).rows]
        parts = densities(sizes, number, rate=self.rate, last=self.last)
        kept = sum(density * size for density, size in zip(parts, sizes, strict=True))
        return plan(model, self.inputs, recipe, target=Sparsity(1 - kept / sum(sizes)), skip=self.skip)

    def describe(self) -> str:
        """All settings except the example batch, to identify a run."""
        recipe = self.recipe.describe() if self.recipe else None
        return f"rate={self.rate!r} last={self.last!r} recipe={recipe} skip={list(self.skip)}"


@training(source="Frankle and Carbin 2019, arXiv:1803.03635", status="stable")
def imp(
    inputs: Inputs, *, rate: float = 0.2, last: float = 0.5, recipe: Recipe | None = None, skip: Sequence[str] = ()
) -> PruningRounds:
    """Prune the same fraction of the remaining weights in every round.

    After round k a layer keeps `(1 - rate)^k` of its weights and the last layer `(1 - last * rate)^k`: 80.04, 51.28,
    21.07, 13.52 and 3.58 % of LeNet-300-100 after 1, 3, 7, 9 and 15 rounds of 20 %. Weights are pruned by magnitude,
    within each layer. Data: none beyond the example batch.

    inputs: an example batch. rate: in (0, 1), relative to the remaining weights. last: factor in (0, 1] on the rate of
    the layer that runs last. recipe: another recipe, such as `global_magnitude()`; the full model then keeps
    `(1 - rate)^k`, and `last` has no effect. skip: patterns of layers that are kept dense. For a criterion that needs
    data, write the
    function yourself: `lambda model, k: plan(model, batch, recipe, target=Sparsity(1 - 0.8**k), data=..., loss=...)`.

    Use: lottery tickets, as `find_ticket(model, spec, prune=imp(batch), rounds=15)`. Avoid: one-shot pruning with one
    recovery: call `plan` once.
    """
    check_rates(rate, last)
    return PruningRounds(inputs, rate, last, recipe, tuple(skip))
