"""NetAdapt: a small cut of one group in each step; the group is chosen by trying all groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from prunella.errors import RequestError, TargetMissed
from prunella.io.journal import Records, open_records
from prunella.model.rng import seeded
from prunella.model.state import untouched
from prunella.model.user_code import quality_of
from prunella.registry.method import search
from prunella.search.space import Evaluate, Predict, SearchResult, Space
from prunella.selection import Counts
from prunella.targets import Sparsity, Target

Tune = Callable[[nn.Module], object]
"""A function that trains a model in place, briefly and deterministically (`Training(seed=...)`)."""


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
) -> SearchResult:
    """Reduce the cost in steps; in each step every group proposes a cut, and the best proposal is taken.

    `R_i = R_{i-1} - dR`: each group proposes the smallest removal that brings the present cost to at most `R_i`, with
    `dR = step` of the dense cost. Every step therefore reduces the cost by at least dR, and the last step by the rest.
    A proposal is cut from the current model, tuned briefly and evaluated. The best proposal, with its tuned weights,
    becomes the current model, and its units are scored again. Costs are exact, for coupled widths too.

    step: dR as a fraction of the dense cost, in (0, 1). tune: trains a proposal in place; without it weights stay.
    predict: milliseconds of counts for a `Latency`, from `latency_table`; without it each proposal is timed.
    folder: of a journal of the evaluations. A killed search is resumed: the chosen proposals are cut and tuned again,
    so that `tune` must be deterministic; no proposal is evaluated twice.

    Errors: TargetMissed if no group can make the next step.
    target: as in `plan`. evaluate: quality of a model, higher is better.

    Use: latency or multiply-adds under a strict budget, with some time. Avoid: hundreds of groups: each step evaluates
    all groups.
    """
    if not 0 < step < 1:
        raise RequestError(f"netadapt cannot use step={step:g}", "a fraction of the dense cost", "0 < step < 1")
    question = {"question": "netadapt", "tune": tune, "metric": evaluate}
    with open_records(folder, lambda: space.identity.plus(question)) as records:
        return _Descent(space, evaluate, tune, records).run(target, step, predict)


@dataclass(frozen=True)
class _Descent:
    """One call of `netadapt`. The key of a quality is its path: all cuts taken before, and the proposal."""

    space: Space
    evaluate: Evaluate
    tune: Tune | None
    records: Records

    def run(self, target: Target, step: float, predict: Predict | None) -> SearchResult:
        space = self.space
        cost = predict or (lambda counts: space.cost(target, counts))
        counts: Counts = (0,) * len(space.names)
        spent, budget = cost(counts), space.budget(target, predict)
        reduction = step * (sum(space.sizes) if isinstance(target, Sparsity) and target.of == "prunable" else spent)
        if spent <= budget:
            raise TargetMissed(f"{target} would remove nothing", f"{spent:.6g} of at most {budget:.6g}", "ask for less")
        current, value, taken = space, 0.0, list[str]()
        while spent > budget * (1 + 1e-12):
            limit = max(budget, spent - reduction)
            proposals = [(i, _smallest(space, counts, i, limit, cost)) for i in range(len(counts))]
            offers = {
                i: proposal for i, proposal in proposals if proposal is not None and space.names[i] in current.names
            }
            if not offers:
                why = f"after {len(taken)} steps {spent:.6g} remains, and no group alone can bring it to {limit:.6g}"
                todo = "take smaller steps, or a lower min_density="
                raise TargetMissed(f"{target} cannot be met in steps of {step:g}", why, todo)
            values = {i: self._quality(current, counts, proposal, taken, i) for i, proposal in offers.items()}
            best = max(values, key=lambda i: (values[i], -i))
            current = space.of(self._cut(current, counts, offers[best]))
            counts, value = offers[best], values[best]
            taken.append(_key(space, best, counts))
            spent = cost(counts)
        return SearchResult(space.shares(counts), value, spent, self.records.added, current.model)

    def _quality(self, current: Space, counts: Counts, new: Counts, taken: list[str], index: int) -> float:
        """The quality of the proposal `new`, which cuts more of the group `index`."""

        def measured() -> float:
            small = self._cut(current, counts, new)
            with untouched(small, self.space.recipe.seed):
                return quality_of(self.evaluate(small), "evaluate=", "a proposal", dense=False)

        return self.records.number(" ".join([*taken, _key(self.space, index, new)]), measured)

    def _cut(self, current: Space, counts: Counts, new: Counts) -> nn.Module:
        """The current model without the units that `new` removes beyond `counts`, tuned."""
        more = {name: b - a for name, a, b in zip(self.space.names, counts, new, strict=True)}
        small = current.cut(tuple(more[name] for name in current.names))
        if self.tune is not None:
            with seeded(current.recipe.seed):
                self.tune(small)
        return small


def _key(space: Space, index: int, counts: Counts) -> str:
    return f"{space.names[index]}:{counts[index]}"


def _smallest(space: Space, counts: Counts, index: int, limit: float, cost: Predict) -> Counts | None:
    """The counts with the smallest further removal in one group such that the cost is at most `limit`, or None."""
    options = [removed for removed in space.levels(index) if removed > counts[index]]

    def with_(removed: int) -> Counts:
        return (*counts[:index], removed, *counts[index + 1 :])

    if not options or cost(with_(options[-1])) > limit * (1 + 1e-12):
        return None
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(with_(options[middle])) <= limit * (1 + 1e-12) else (middle + 1, high)
    return with_(options[low])
