"""Iterative pruning before training: a target is met in many rounds, each with scores of the masked network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from prunella.allocation import global_
from prunella.criteria import snip, synflow
from prunella.errors import RequestError
from prunella.granularity import Competing, Element
from prunella.model.copying import copied
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.accounting import amount
from prunella.planning.checks import check_finite, checked_target
from prunella.planning.masked_plan import masked_plan
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.planning.request import prepare
from prunella.registry.controlled import name_of
from prunella.registry.method import search
from prunella.schedules import Schedule, exponential
from prunella.stats import Source
from prunella.stats.masked import Before
from prunella.targets import Sparsity, Target, part_of
from prunella.types import Inputs, Loss


@dataclass(frozen=True)
class Rounds:
    """The rounds of iterative pruning.

    count: rounds, at least 1. schedule: progress in (0, 1] -> fraction of the target; by default every round removes
    the same fraction of the remaining weights. nested: masked weights stay masked in later rounds.
    """

    count: int = 100
    schedule: Schedule | None = None
    nested: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"count={self.count} rounds do nothing", "at least 1 is needed", "for example 100")

    def targets(self, target: Target, dense: float) -> list[Target]:
        """The target of every round, the last one `target` itself. dense: the full model in the target's unit."""
        density = 1 - target.value if isinstance(target, Sparsity) else target.absolute(dense) / dense
        curve = self.schedule or (
            partial(exponential, rho=1 / density) if 0 < density < 1 else lambda progress: progress
        )
        parts = [part_of(target, curve(k / self.count), lambda: dense) for k in range(1, self.count)]
        return [*parts, target]


@search(source="Tanaka et al. 2020, arXiv:2006.05467; Verdenius et al. 2020, arXiv:2006.00896")
def iterate(
    model: nn.Module,
    inputs: Inputs,
    recipe: Recipe,
    *,
    target: Target,
    rounds: Rounds = Rounds(),
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    skip: Sequence[str] = (),
) -> Plan:
    """Meet a target in rounds, each with statistics of the network masked so far; `model` does not change.

    Round k of n meets the fraction `schedule(k / n)` of the target, exactly as `plan` does; without a schedule the
    density after round k is `d^(k/n)`. Statistics are those of the masked network, but a criterion that multiplies by
    weights uses the dense ones. With `nested` a masked weight ranks behind all others; without `nested` the weight
    competes and may come back. The result is the plan of the last round. Data: as the criterion needs, once per round.
    For masks whose units compete; `min_units=0` in the recipe allows empty layers, as in the papers.
    Errors: RequestError for units that do not compete; those of `plan`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> recipe, rounds = pr.Recipe(pr.criteria.synflow, pr.Element()), pr.planning.Rounds(count=3)
        >>> print(pr.planning.iterate(model, x, recipe, target=pr.Sparsity(0.75), rounds=rounds).outcome)
        asked sparsity=0.75, got sparsity=0.75

    Use: more than about 95 % before training, with any criterion. Avoid: criteria that do not depend on other weights,
    such as magnitude: one round gives the same plan.
    """
    model = with_plain_weights(model)
    if not isinstance(recipe.granularities[0], Competing):
        what = f"{name_of(type(recipe.granularities[0]))} cannot be approached in rounds"
        raise RequestError(what, "rounds mask weights that compete", "use Element(), Block, Vector, Kernel or Filter")
    final = checked_target(recipe.granularities, target)
    assert final is not None, "units compete, so there is a target"
    check_finite(model)
    replica = copied(model)
    with untouched(replica, recipe.seed):
        request = prepare(replica, inputs, recipe, target=final, source=Source(data, loss), skip=skip, only=())
    dense = 1.0 if isinstance(final, Sparsity) else float(getattr(amount(request.graph, {}), final.name))
    before = Before(nested=rounds.nested)
    for part in rounds.targets(final, dense):
        with untouched(replica, recipe.seed):
            plan = masked_plan(replace(request, target=part, before=before))
        before = Before(plan.masks, rounds.nested)
    settings = {"count": rounds.count, "nested": rounds.nested, "schedule": name_of(rounds.schedule or exponential)}
    return replace(plan, recipe={**plan.recipe, "rounds": settings})


@search(source="Tanaka et al. 2020, arXiv:2006.05467", status="stable")
def synflow_rounds(model: nn.Module, inputs: Inputs, *, target: Target, count: int = 100) -> Plan:
    """SynFlow as in the paper: `count` rounds, the same part of the survivors each, one ranking, layers may empty.

    `S = |w| dR/d|w|` of the network masked so far; density `d^(k/n)` after round k of n. Data: none. count: at least 1;
    with one round layers collapse.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.planning.synflow_rounds(model, x, target=pr.Sparsity(0.75), count=5).outcome)
        asked sparsity=0.75, got sparsity=0.75

    Use: densities below 1 % before training, where every other score empties layers. Avoid: networks with layer norm or
    token tables, through which ones do not flow.
    """
    return iterate(model, inputs, Recipe(synflow, Element(), global_, min_units=0), target=target, rounds=Rounds(count))


@search(source="de Jorge et al. 2021, arXiv:2006.09081; Verdenius et al. 2020, arXiv:2006.00896")
def iterative_snip(
    model: nn.Module, inputs: Inputs, *, target: Target, data: Iterable[Any], loss: Loss, count: int = 50
) -> Plan:
    """SNIP in rounds: gradients of the network masked so far, and what is masked stays masked.

    `S = |g w|` with `g` at the masked weights; density `d^(k/n)` after round k of n. Data: batches and a loss, once a
    round. count: at least 1; with one round it is `snip`.

    Use: 95 % and more before training, with labels. Avoid: if early mistakes must be corrected: take `force`.
    """
    recipe = Recipe(snip, Element(), global_, min_units=0)
    return iterate(model, inputs, recipe, target=target, rounds=Rounds(count), data=data, loss=loss)


@search(source="de Jorge et al. 2021, arXiv:2006.09081")
def force(
    model: nn.Module, inputs: Inputs, *, target: Target, data: Iterable[Any], loss: Loss, count: int = 50
) -> Plan:
    """Progressive sparsification: as `iterative_snip`, but masked weights compete in every round and may come back.

    `S = |g(m * w) w|`: the gradient at the masked weights, times the dense weight. Density `d^(k/n)` after round k.
    Data: batches and a loss, once a round. count: at least 1.

    Use: 95 % and more before training, with labels. Avoid: one round or two, where it is `snip` with more work.
    """
    recipe = Recipe(snip, Element(), global_, min_units=0)
    rounds = Rounds(count, nested=False)
    return iterate(model, inputs, recipe, target=target, rounds=rounds, data=data, loss=loss)
