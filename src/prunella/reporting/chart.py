"""Charts as inline SVG: plain shapes and text, in the colors of the page, deterministic."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from prunella.measure.timing import Comparison
from prunella.reporting.extra import needing_report
from prunella.reporting.report import Curve

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

# Placeholder colors, replaced by those of the page, light or dark.
INK, MUTED, GRID, DENSE, PRUNED = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", DENSE: "dense", PRUNED: "pruned"}
_ALONE = {"ink": "#444444", "muted": "#666666", "line": "#dddddd", "dense": "#777777", "pruned": "#1f77b4"}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_ELEMENTS = frozenset(("svg", "g", "path", "use", "defs", "text", "tspan", "clipPath", "rect"))
_ATTRIBUTES = frozenset(("id", "d", "style", "transform", "x", "y", "width", "height", "viewBox", "clip-path"))
_HARMLESS = re.compile(r"[^\"'<>&\\]*")
WIDE, NARROW = 7.6, 3.6
"""Widths in inches, for a desktop column and for a phone. Text has the same size in both."""


def latency_chart(latency: Comparison, width: float = WIDE) -> Markup:
    """Every sample of both models as a dot, with the median and the middle half."""

    def draw(axes: Axes) -> None:
        pairs = list(zip(latency.latencies[:2], (DENSE, PRUNED), strict=True))
        for row, (one, color) in enumerate(pairs):
            times = [1e3 * t for t in one.samples]
            # Samples follow each other upwards, so that a drift of the machine shows as a slope.
            lift = [row - 0.3 + 0.6 * i / max(1, len(times) - 1) for i in range(len(times))]
            axes.scatter(times, lift, s=14, color=color, alpha=0.45, linewidths=0)
            low, high = (1e3 * t for t in one.quartiles)
            axes.plot([low, high], [row, row], color=color, linewidth=5, alpha=0.5, solid_capstyle="butt")
            axes.plot([1e3 * one.median] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=1.6)
        axes.set_yticks([0, 1], [one.name for one, _ in pairs])
        axes.set_ylim(1.6, -0.6)
        _, most = _range([1e3 * t for one, _ in pairs for t in one.samples])
        axes.set_xlim(0, most)
        axes.set_xlabel("ms per forward pass")
        axes.grid(axis="x", color=GRID, linewidth=0.8)

    return figure("latency", draw, width, 1.9)


def curve_chart(curve: Curve, width: float = WIDE) -> Markup:
    """The recovery curve, with the dense model's value as a dashed line."""

    def draw(axes: Axes) -> None:
        x, y = [p[0] for p in curve.points], [p[1] for p in curve.points]
        if curve.reference is not None:
            axes.axhline(curve.reference, color=DENSE, linewidth=1.4, linestyle=(0, (4, 3)))
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "color": MUTED}
            axes.annotate(f"dense {curve.reference:.4g}", (x[-1], curve.reference), **above)  # type: ignore[arg-type]
        axes.plot(x, y, color=PRUNED, linewidth=2, marker="o", markersize=3.5, clip_on=False)
        axes.set_xlabel(curve.steps)
        axes.set_ylabel(curve.name)
        axes.margins(x=0.02, y=0.15)
        axes.grid(color=GRID, linewidth=0.8)

    return figure("curve", draw, width, 2.6)


def figure(tag: str, draw: Callable[[Axes], None], width: float, height: float) -> Markup:
    """The drawing of `draw` as clean SVG, in inches. tag: unique among the charts of a page."""
    with needing_report("a chart"):
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"prunella-{tag}-{width}",
        "font.size": 9.0,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": INK,
        "text.color": INK,
        "text.parse_math": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return clean_svg(stream.getvalue(), f"{tag}{int(width * 10)}")


def alone(chart: Markup) -> str:
    """A chart as a separate SVG file, with its own colors."""
    text = str(chart).replace("<svg ", f'<svg xmlns="{_SVG[1:-1]}" ', 1)
    for name, color in _ALONE.items():
        text = text.replace(f"var(--{name})", color)
    return text


def clean_svg(source: bytes, prefix: str) -> Markup:
    """The SVG reduced to shapes and text with harmless attributes; ids get a prefix, so that charts share none."""
    with needing_report("a chart"):
        from markupsafe import Markup
    root = ElementTree.fromstring(source)
    clean = _clean(root, prefix)
    if clean is None:
        return Markup("")
    clean.set("role", "img")
    text = ElementTree.tostring(clean, encoding="unicode")
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(text)  # built above from allowed elements only, text escaped by the serializer


def _clean(element: ElementTree.Element, prefix: str) -> ElementTree.Element | None:
    tag = element.tag.removeprefix(_SVG) if isinstance(element.tag, str) else ""
    if tag not in _ELEMENTS:
        return None
    copy = ElementTree.Element(tag)
    for name, value in element.attrib.items():
        short = "href" if name == _HREF else name
        if short == "href" and value.startswith("#"):
            copy.set("href", f"#{prefix}-{value[1:]}")
        elif short in _ATTRIBUTES and _allowed(value):
            value = f"{prefix}-{value}" if short == "id" else value.replace("url(#", f"url(#{prefix}-")
            copy.set(short, value)
    copy.text = element.text if tag in ("text", "tspan") else None
    copy.extend(child for child in (_clean(entry, prefix) for entry in element) if child is not None)
    return copy


def _allowed(value: str) -> bool:
    value = re.sub(r"'[\w -]*'", "", value)  # names of fonts
    return bool(_HARMLESS.fullmatch(value)) and not re.search(r"url\((?!#)|:\s*//|javascript", value, re.IGNORECASE)


def _range(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    # One interrupted sample must not squeeze all others to the left.
    return ordered[0], 1.08 * ordered[min(len(ordered) - 1, int(0.985 * len(ordered)))]
