"""Quality against size, for several methods and seeds: the table, the curves with their bands, the page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunella.errors import BadInput, PruningError, RequestError
from prunella.io.files import write_atomic
from prunella.io.json import encode, plain
from prunella.measure.text import MISSING, interval, spread
from prunella.reporting.chart import DENSE, GRID, INK, MUTED, NARROW, PRUNED, WIDE, figure
from prunella.reporting.page import render_sections
from prunella.reporting.section import Section

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

DENSE_NAME = "dense"


@dataclass(frozen=True)
class Cell:
    """One model: a method at one compression ratio with one seed. `error`: the reason if there is no model.

    score: the result of `evaluate`. remaining: fractions of the dense parameters and multiply-adds, without zeros.
    """

    method: str
    ratio: float
    seed: int
    score: float = math.nan
    params: float = math.nan
    macs: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class Point:
    """A method at one ratio over its seeds: mean, standard deviation (n - 1) and Student's 95 % interval of the mean.

    n: seeds that gave a model, of `of`. compression: mean of original / new parameters. front: no complete point is at
    least as small and as good, and better in one of the two. std and interval are not finite with a single seed.
    """

    method: str
    ratio: float
    n: int
    of: int
    mean: float
    std: float
    low: float
    high: float
    compression: float
    macs: float
    front: bool = False


@dataclass(frozen=True)
class Frontier:
    """The result of an experiment. unit: the quantity of `ratio`."""

    cells: tuple[Cell, ...]
    points: tuple[Point, ...]
    dense: Point
    seeds: tuple[int, ...]
    unit: str
    baselines: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order in which they were given, baselines last."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def failures(self) -> tuple[Cell, ...]:
        """The cells without a model, with their reasons."""
        return tuple(cell for cell in self.cells if cell.error)

    def point(self, method: str, ratio: float) -> Point:
        """One point; KeyError if there is none."""
        point = next((p for p in self.points if p.method == method and p.ratio == ratio), None)
        if point is None:
            raise KeyError(f"{method} at {ratio:g}")
        return point

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def json(self) -> str:
        """As JSON text; numbers that are not finite become null."""
        return encode(plain(self.data()), indent=1, sort=False)

    def __str__(self) -> str:
        parts = [self._table(), *([self.reasons()] if self.failures else [])]
        return "\n\n".join(map(str, parts))

    def section(self) -> Section:
        """Table and curves, for a report: `report(...).adding(frontier.section())`. Errors: MissingExtra."""
        return replace(self._table(), charts=tuple(frontier_chart(self, width) for width in (WIDE, NARROW)))

    def _table(self) -> Section:
        """The same without the curves, which need the extra `report`."""
        lead = (
            f"Mean over {len(self.seeds)} seeds, standard deviation, and Student's 95 % interval of the mean; ratio is "
        )
        lead += (
            f"of {self.unit}, original / new. Dense: {spread(self.dense.mean, self.dense.std)}. * on the Pareto front; "
        )
        lead += "bands wider than the chart are cut off."
        if self.failures:
            lead += f" {len(self.failures)} of {len(self.cells)} models failed: see the reasons."
        rows = [self._row(point) for point in self.points]
        header = ("Method", "Ratio", "Got", "Score", "95 %", "Seeds", "Front")
        return Section("Quality against size", lead, header, tuple(rows))

    def reasons(self) -> Section:
        """The cells that failed, with their reasons."""
        seeds_of: dict[tuple[str, float, str], list[int]] = {}
        for cell in self.failures:
            seeds_of.setdefault((cell.method, cell.ratio, cell.error), []).append(cell.seed)
        rows = [(m, f"{r:g}", ", ".join(map(str, seeds)), why) for (m, r, why), seeds in seeds_of.items()]
        return Section("Failed models", "One row for each reason.", ("Method", "Ratio", "Seeds", "Why"), tuple(rows))

    def _row(self, p: Point) -> tuple[str, ...]:
        compression, between = f"{p.compression:.3g}x", interval(p.low, p.high) if p.n > 1 else MISSING
        name = f"{p.method} (baseline)" if p.method in self.baselines else p.method
        if not p.n:
            return (name, f"{p.ratio:g}", MISSING, "failed", MISSING, f"0 of {p.of}", "")
        return (
            name,
            f"{p.ratio:g}",
            compression,
            spread(p.mean, p.std),
            between,
            f"{p.n} of {p.of}",
            "*" if p.front else "",
        )


def unmeasured(cell: Cell | None) -> PruningError:
    """The error for a dense model without a quality, with the reason of its cell; BadInput for errors of user code."""
    why = cell.error if cell else "there is no cell of it"
    kind = RequestError if cell is None or why.startswith(RequestError.__name__) else BadInput
    return kind("the dense model cannot be measured", why, "check make=, inputs= and evaluate=")


def summarize(
    cells: Sequence[Cell], *, unit: str, baselines: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Frontier:
    """The points of the cells, and which of them are on the front. Errors: RequestError without a dense model."""
    keys = dict.fromkeys((cell.method, cell.ratio) for cell in cells)
    points = [_point([c for c in cells if (c.method, c.ratio) == key]) for key in keys]
    dense = next((p for p in points if p.method == DENSE_NAME and p.n), None)
    if dense is None:
        raise unmeasured(next((c for c in cells if c.method == DENSE_NAME and c.error), None))
    others = [p for p in points if p.method != DENSE_NAME]
    marked = tuple(Point(**{**asdict(p), "front": on_front(p, others)}) for p in others)
    seeds = tuple(dict.fromkeys(cell.seed for cell in cells))
    rest = tuple(cell for cell in cells if cell.method != DENSE_NAME)
    return Frontier(rest, marked, dense, seeds, unit, tuple(baselines), dict(environment or {}))


def on_front(point: Point, points: Sequence[Point]) -> bool:
    """Whether no complete point dominates it; a point that lacks seeds is never on the front."""
    if point.n < point.of:
        return False
    rivals = [p for p in points if p.n == p.of]
    return not any(
        p.mean >= point.mean
        and p.compression >= point.compression
        and (p.mean > point.mean or p.compression > point.compression)
        for p in rivals
    )


def _point(cells: Sequence[Cell]) -> Point:
    good = [cell for cell in cells if not cell.error]
    scores = np.array([cell.score for cell in good], float)
    n = len(good)
    mean = float(scores.mean()) if n else math.nan
    std = float(scores.std(ddof=1)) if n > 1 else math.nan
    half = _half_width(scores) if n > 1 else math.nan
    size = float(np.mean([1 / cell.params for cell in good])) if n else math.nan
    macs = float(np.mean([cell.macs for cell in good])) if n else math.nan
    first = cells[0]
    return Point(first.method, first.ratio, n, len(cells), mean, std, mean - half, mean + half, size, macs)


def _half_width(scores: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Half of Student's 95 % interval of the mean; 0 for equal scores, for which `t.interval` has no answer."""
    from scipy.stats import sem, t

    return float(t.ppf(0.975, len(scores) - 1) * sem(scores))


def frontier_chart(frontier: Frontier, width: float = WIDE) -> Markup:
    """A curve for each method with the band of its interval, and every seed as a dot; baselines are gray and dashed."""
    lines = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
    marks = "osD^vP"

    def draw(axes: Axes) -> None:
        own = baseline = 0
        for method in frontier.methods:
            points = [p for p in frontier.points if p.method == method and p.n]
            if not points:
                continue
            x, y = [p.compression for p in points], [p.mean for p in points]
            based = method in frontier.baselines
            color = DENSE if based else (PRUNED if not own else INK)
            number = baseline if based else own
            style: Any = {"linestyle": lines[(number + based) % 4], "marker": marks[number % 6]}
            baseline, own = baseline + based, own + (not based)
            axes.plot(
                x, y, color=color, linewidth=1.8, markersize=4.5, label=_short(method), zorder=2 + (not based), **style
            )
            banded = [p for p in points if p.n > 1]
            low, high = [p.low for p in banded], [p.high for p in banded]
            axes.fill_between(
                [p.compression for p in banded], low, high, color=color, alpha=0.06 if based else 0.16, linewidth=0
            )
            cells = [c for c in frontier.cells if c.method == method and not c.error]
            axes.scatter(
                [1 / c.params for c in cells], [c.score for c in cells], s=7, color=color, alpha=0.5, linewidths=0
            )
        axes.axhline(frontier.dense.mean, color=DENSE, linewidth=1)
        axes.annotate("dense", (1, frontier.dense.mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", color=MUTED)  # fmt: skip
        shown = [p.mean for p in (*frontier.points, frontier.dense) if p.n] + [
            c.score for c in frontier.cells if not c.error
        ]
        margin = 0.08 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)  # a band of few seeds may be wider than all there is
        axes.set_xscale("log", base=2)
        ratios = sorted({p.ratio for p in frontier.points if p.n})
        axes.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("parameters, original / new")
        axes.set_ylabel("score")
        axes.grid(color=GRID, linewidth=0.8)
        below = {
            "bbox_to_anchor": (0, -0.17 if width > 5 else -0.2),
            "loc": "upper left",
            "ncols": 2 if width > 5 else 1,
        }
        if ratios:
            axes.legend(frameon=False, borderaxespad=0.0, handlelength=3.2, fontsize=8.5, **below)  # type: ignore[arg-type]

    return figure("frontier", draw, width, 4.2 if width > 5 else 4.4)


def write_frontier(frontier: Frontier, path: str | os.PathLike[str]) -> Path:
    """The page: curves, table, reasons, environment; written atomically. Errors: RequestError when it cannot be."""
    headline = f"Highest mean: {'; '.join(_leaders(frontier)) or 'no method'}."
    lead = f"{len(frontier.methods)} methods, {len({p.ratio for p in frontier.points})} ratios, {len(frontier.seeds)} "
    lead += "seeds."
    parts = [frontier.section(), *([frontier.reasons()] if frontier.failures else [])]
    return write_atomic(path, render_sections(headline, lead, parts, frontier.environment).encode())


def _short(name: str, limit: int = 40) -> str:
    """A name that leaves room for the chart."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _leaders(frontier: Frontier) -> list[str]:
    """The methods with the highest mean at each ratio, `lamp at 2x, 4x`; ratios with several leaders are omitted."""
    leads: dict[str, list[str]] = {}
    for ratio in dict.fromkeys(p.ratio for p in frontier.points):
        there = [p for p in frontier.points if p.ratio == ratio and p.n == p.of]
        best = [p for p in there if p.mean == max(q.mean for q in there)]
        if len(best) == 1:
            leads.setdefault(best[0].method, []).append(f"{ratio:g}x")
    return [f"{method} at {', '.join(ratios)}" for method, ratios in leads.items()]
