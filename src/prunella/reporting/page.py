"""The report as one HTML file: without scripts and external resources, for light, dark, desktop, phone and paper."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunella.errors import printable
from prunella.io.files import write_atomic
from prunella.reporting.chart import NARROW, curve_chart, latency_chart
from prunella.reporting.extra import needing_report
from prunella.reporting.report import LayerLine, Metric, Report, shown
from prunella.reporting.section import Section

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
_FOLD_AFTER = 24
"""Longer tables start folded."""


@dataclass(frozen=True)
class Tile:
    """One headline number. `tone`: good, plain or none."""

    label: str
    value: str
    detail: str
    tone: str = "plain"


@dataclass(frozen=True)
class Kept:
    """One reason for frozen positions, and the places where it applies."""

    reason: str
    where: str
    names: tuple[str, ...]


def write_page(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page, atomically. Errors: RequestError when the file cannot be written, MissingExtra."""
    return write_atomic(path, render_page(report).encode())


def render_page(report: Report) -> str:
    """The page as text. Everything that comes from a model (names above all) is escaped."""
    environment = templates()
    shares = _shares(report)
    context: dict[str, Any] = {
        "report": report,
        "tiles": tiles(report),
        "style": _style(),
        "latency_charts": (latency_chart(report.latency), latency_chart(report.latency, NARROW)),
        "curve_charts": _curve_charts(report),
        "kept": why_kept(report),
        "shares": shares,
        "most_share": max((share for _, *both in shares for share in both), default=0.0) or 1.0,
        "most_macs": max((layer.macs_before for layer in report.layers), default=0) or 1,
        "fold_after": _FOLD_AFTER,
        "recipe": json.dumps(dict(report.recipe), indent=2, default=str) if report.recipe else "",
        "headline": headline(report),
    }
    return environment.get_template("report.html").render(context)


def render_sections(headline: str, lead: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """A page of sections alone, in the look of the report; all text is escaped."""
    environment = templates()
    context: dict[str, Any] = {"headline": headline, "lead": lead, "sections": sections, "environment": facts}
    return environment.get_template("experiment.html").render(context, style=_style(), fold_after=2 * _FOLD_AFTER)


def _style() -> Markup:
    from markupsafe import Markup

    return Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))


def templates() -> Environment:
    """The templates of this folder, with automatic escaping. Errors: MissingExtra without jinja2."""
    with needing_report("the HTML page"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    loader = FileSystemLoader(_FOLDER)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters.update(shown=shown, percent=_percent, shape=_shape, sentence=_sentence, minus=_minus)
    return environment


def _visible(value: object) -> object:
    """A text without direction marks and invisible characters; text marked as safe is unchanged."""
    return printable(value) if type(value) is str else value


def headline(report: Report) -> str:
    """The verdict in a dozen words; the interval follows below it."""
    ratio = report.latency.ratio
    if ratio.faster:
        speed = f"{ratio.value:.2f}× faster"
    elif ratio.slower:
        speed = f"{1 / ratio.value:.2f}× slower"
    else:
        speed = "no faster on this device"
    first = report.smaller[0]
    scores = [m for m in report.metrics if m.unit == "score"]
    quality = f", {scores[0].name} {scores[0].before:.3g} → {scores[0].after:.3g}" if scores else ""
    joined = f"{first} and {speed}" if ratio.faster and first != "not smaller" else f"{first}, {speed}"
    return f"{_sentence(joined)}{quality}."


def tiles(report: Report) -> tuple[Tile, ...]:
    """Speed, size and quality, in that order."""
    ratio = report.latency.ratio
    speed, label = (ratio.value, "faster") if ratio.value >= 1 else (1 / ratio.value, "slower")
    took = report.metric("latency")
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    sure = ratio.faster or ratio.slower
    first = Tile(
        "Latency" if sure else "Latency: no speed-up shown",
        f"{speed:.2f}× {label}" if sure else f"{ratio.value:.2f}×",
        f"{shown(took.before, 'seconds')} → {shown(took.after, 'seconds')}; {interval}",
        "good" if ratio.faster else "plain",
    )
    shown_first = ("multiply-adds", "parameters", "non-zero weights", "size on disk")
    sizes = [_size_tile(m) for name in shown_first for m in report.metrics if m.name == name]
    scores = [
        Tile(m.name, f"{m.after:.4g}", f"{m.before:.4g} before, {m.change}")
        for m in report.metrics
        if m.unit == "score"
    ]
    return (first, *sizes[:2], *scores[:1]) if scores else (first, *sizes[:3])


def why_kept(report: Report) -> tuple[Kept, ...]:
    """The parts that were not pruned: one entry for each reason and place in the source."""
    entries: dict[tuple[str, str], list[str]] = {}
    for entry in report.frozen:
        where = "" if entry.axis < 0 else f", axis {entry.axis}"
        text = f"{entry.entity}{where} ({entry.count:,})"
        entries.setdefault((entry.reason, entry.where), []).append(text)
    return tuple(Kept(reason, where, tuple(names)) for (reason, where), names in entries.items())


def _size_tile(metric: Metric) -> Tile:
    fewer = metric.after < metric.before
    value = f"{metric.remaining - 1:+.0%}" if metric.after != metric.before else "same"
    detail = f"{shown(metric.before, metric.unit)} → {shown(metric.after, metric.unit)}"
    return Tile(metric.name, _minus(value), detail, "good" if fewer else "plain")


def _curve_charts(report: Report) -> tuple[Any, ...]:
    if report.curve is None or not report.curve.points:
        return ()
    return curve_chart(report.curve), curve_chart(report.curve, NARROW)


def _shares(report: Report) -> tuple[tuple[LayerLine, float, float], ...]:
    """Each layer with its share of the full pass, before and after."""
    before, after = (seconds or 1.0 for seconds in report.pass_seconds)
    return tuple((one, one.seconds_before / before, one.seconds_after / after) for one in report.layers)


def _percent(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}%}"


def _sentence(text: str) -> str:
    """The text with a capital first letter; the rest does not change."""
    return text[:1].upper() + text[1:]


def _minus(text: str) -> str:
    """A hyphen before a number as a minus sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
