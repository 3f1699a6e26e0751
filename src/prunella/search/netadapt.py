"""NetAdapt: a little of one group at a time, the group chosen by trying all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from prunella.errors import RequestError, TargetMissed
from prunella.io.journal import Records, open_records
from prunella.model.rng import seeded
from prunella.model.state import untouched
from prunella.registry.method import search
from prunella.search.space import Evaluate, Found, Predict, Space
from prunella.selection import Counts
from prunella.targets import Sparsity, Target

Tune = Callable[[nn.Module], object]
"""Trains a model in place, briefly; the same each time for the same model (`Training(seed=...)`)."""


@search(source="Yang et al. 2018, arXiv:1804.03230")
def netadapt(
    space: Space,
    target: Target,
    evaluate: Evaluate,
    *,
    step: float = 0.05,
    tune: Tune | None = None,
    predict: Predict | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Found:
    """Cut the budget in steps; in each, every group proposes its own cut, and the best proposal is kept.

    `R_i = R_{i-1} - dR`: each group proposes the fewest units whose removal brings the cost from where it is to at most
    `R_i`, with `dR = step` of the dense cost; every step therefore reduces it by at least dR, the last by what is left.
    A proposal is cut from the current model, tuned briefly and evaluated; the winner, with its tuned weights, is the
    next current model, whose units are scored anew. Costs are exact at each proposal: coupled widths are dealt with.

    step: dR as a fraction of the dense cost, in (0, 1). tune: trains a proposal in place; without it weights stay.
    predict: milliseconds of counts for a `Latency`, from `latency_table`; without it each proposal is timed.
    folder: a journal of the evaluations. A killed search goes on where it was: winners are cut and tuned again, so that
    `tune` must do the same each time; nothing is evaluated twice.

    Errors: TargetMissed when no group can give the next step.

    Use: latency or multiply-adds under a strict budget, with some time. Avoid: hundreds of groups: each step evaluates
    all of them.
    """
    if not 0 < step < 1:
        raise RequestError(f"netadapt cannot use step={step:g}", "a fraction of the dense cost", "0 < step < 1")
    asked = {"question": "netadapt", "tune": tune, "metric": evaluate}
    with open_records(folder, lambda: space.identity.plus(asked)) as records:
        return _Descent(space, evaluate, tune, records).run(target, step, predict)


@dataclass(frozen=True)
class _Descent:
    """One call of `netadapt`. The key of a quality is the path to it: every cut that won before, and the proposal."""

    space: Space
    evaluate: Evaluate
    tune: Tune | None
    records: Records

    def run(self, target: Target, step: float, predict: Predict | None) -> Found:
        space = self.space
        cost = predict or (lambda counts: space.cost(target, counts))
        counts: Counts = (0,) * len(space.names)
        spent, budget = cost(counts), space.budget(target, predict)
        least = step * (spent if not isinstance(target, Sparsity) else sum(space.sizes))
        if spent <= budget:
            raise TargetMissed(f"{target} would remove nothing", f"{spent:.6g} of at most {budget:.6g}", "ask for less")
        current, value, won = space, 0.0, list[str]()
        while spent > budget * (1 + 1e-12):
            wanted = max(budget, spent - least)
            proposals = [(i, _smallest(space, counts, i, wanted, cost)) for i in range(len(counts))]
            offers = {i: new for i, new in proposals if new is not None and space.names[i] in current.names}
            if not offers:
                why = f"after {len(won)} steps {spent:.6g} remains, and no group alone can bring it to {wanted:.6g}"
                todo = "take smaller steps, or a lower min_density="
                raise TargetMissed(f"{target} cannot be met in steps of {step:g}", why, todo)
            values = {i: self._quality(current, counts, new, won, i) for i, new in offers.items()}
            best = max(values, key=lambda i: (values[i], -i))
            current = space.of(self._cut(current, counts, offers[best]))
            counts, value = offers[best], values[best]
            won.append(_key(space, best, counts))
            spent = cost(counts)
        return Found(space.shares(counts), value, spent, self.records.added, current.model)

    def _quality(self, current: Space, counts: Counts, new: Counts, won: list[str], index: int) -> float:
        """Of the proposal `new`, which cuts more of the group `index`."""

        def measured() -> float:
            small = self._cut(current, counts, new)
            with untouched(small, self.space.recipe.seed):
                return float(self.evaluate(small))

        return self.records.number(" ".join([*won, _key(self.space, index, new)]), measured)

    def _cut(self, current: Space, counts: Counts, new: Counts) -> nn.Module:
        """The current model without what `new` takes beyond `counts`, tuned."""
        more = {name: b - a for name, a, b in zip(self.space.names, counts, new, strict=True)}
        small = current.cut(tuple(more[name] for name in current.names))
        if self.tune is not None:
            with seeded(current.recipe.seed):
                self.tune(small)
        return small


def _key(space: Space, index: int, counts: Counts) -> str:
    return f"{space.names[index]}:{counts[index]}"


def _smallest(space: Space, counts: Counts, index: int, wanted: float, cost: Predict) -> Counts | None:
    """The counts with the fewest more units of one group gone such that the cost is at most `wanted`."""
    options = [gone for gone in space.levels(index) if gone > counts[index]]

    def with_(gone: int) -> Counts:
        return (*counts[:index], gone, *counts[index + 1 :])

    if not options or cost(with_(options[-1])) > wanted * (1 + 1e-12):
        return None
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(with_(options[middle])) <= wanted * (1 + 1e-12) else (middle + 1, high)
    return with_(options[low])
