"""Sensitivity scan: the quality of the model with one pruned group, for each group and several ratios."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunella.allocation import from_scan
from prunella.allocation.pool import Allocation
from prunella.errors import RequestError
from prunella.io.journal import Records, open_records
from prunella.measure.text import percent, significant, table
from prunella.registry.method import search
from prunella.search.space import Evaluate, Space

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)
OnPoint = Callable[[str, float, float], None]
"""Called with the group, the fraction removed and the quality of each new point."""


@dataclass(frozen=True)
class Scan:
    """Sensitivity curves. base: quality of the dense model.

    curves: group -> points (exact fraction removed, quality), ascending in the fraction.  measured: new evaluations.
    """

    base: float
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    measured: int

    @property
    def drops(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Group -> points (fraction removed, quality lost)."""
        return {name: tuple((x, self.base - value) for x, value in curve) for name, curve in self.curves.items()}

    @property
    def allocation(self) -> Allocation:
        """`from_scan` with these curves."""
        return partial(from_scan, drops=self.drops)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"base": self.base, "curves": {name: [list(p) for p in curve] for name, curve in self.curves.items()}}

    def __str__(self) -> str:
        head = f"quality of the dense model: {significant(self.base)}; of the model with one group cut:"
        most_sensitive_first = sorted(self.curves.items(), key=lambda item: min(value for _, value in item[1]))
        rows = [
            (name, "  ".join(f"{percent(x, 0)}: {significant(value)}" for x, value in curve))
            for name, curve in most_sensitive_first
        ]
        return "\n".join([head, *([table((), rows)] if rows else [])])


@search(source="Li et al. 2017, arXiv:1608.08710; Han et al. 2015, arXiv:1506.02626")
def scan(
    space: Space,
    evaluate: Evaluate,
    *,
    ratios: Sequence[float] = RATIOS,
    folder: str | os.PathLike[str] | None = None,
    on_point: OnPoint | None = None,
    base: float | None = None,
) -> Scan:
    """Prune each group alone to several ratios, and evaluate each pruned model.

    `curve_l(x) = evaluate(model without round(x n_l) units of group l)`, by the order of the space's scores. Each point
    prunes a copy; the model and its buffers stay bit for bit the same.

    ratios: fractions in (0, 1), rounded to the steps that `min_density` and `round_to` allow; equal steps are evaluated
    once. `space(only=...)` selects groups. folder: of the journal of evaluations; a killed scan resumes with the next
    evaluation. A journal of another model, recipe, data or evaluation is refused; see `prunella.io.identity`.
    on_point: called with the group (empty for the dense model), the fraction and the quality of each new point. base:
    the quality of the dense model, where it has been evaluated already.
    Errors: RequestError for ratios out of range.

    Use: finding sensitive layers, and options for `knapsack`. Avoid: high reductions without another search: losses of
    several groups do not add up.
    """
    wrong = next((ratio for ratio in ratios if not 0 < ratio < 1), None)
    if wrong is not None or not ratios:
        raise RequestError("scan needs ratios between 0 and 1", f"got {wrong}", "for example ratios=(0.25, 0.5)")
    with open_records(folder, lambda: space.identity.plus({"question": "scan", "metric": evaluate})) as records:
        return _scanned(space, evaluate, ratios, records, on_point, base)


def _scanned(
    space: Space,
    evaluate: Evaluate,
    ratios: Sequence[float],
    records: Records,
    on_point: OnPoint | None,
    base: float | None,
) -> Scan:
    nothing = (0,) * len(space.names)

    def point(name: str, counts: tuple[int, ...]) -> float:
        key, before = f"{name}:{sum(counts)}", records.added
        value = records.number(key, lambda: space.evaluate(evaluate, counts) if name or base is None else base)
        if on_point and records.added > before:
            on_point(name, sum(counts) / space.sizes[space.names.index(name)] if name else 0.0, value)
        return value

    dense, curves = point("", nothing), {}
    for index, name in enumerate(space.names):
        removals = sorted({space.removed({name: ratio})[index] for ratio in ratios} - {0})
        points = {count: point(name, (*nothing[:index], count, *nothing[index + 1 :])) for count in removals}
        curves[name] = tuple((count / space.sizes[index], value) for count, value in points.items())
    return Scan(dense, {name: curve for name, curve in curves.items() if curve}, records.added)
