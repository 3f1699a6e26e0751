"""The curves of a scan as a chart: quality against the fraction that is removed of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from prunella.reporting.chart import PRINTED, THEMED, alone, figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = list[tuple[str, tuple[tuple[float, float], ...]]]
_NAMED = 10
"""As many colors are told apart; of more groups the most sensitive are named, and the others are grey."""


def scan_chart(base: float, curves: Curves, kind: Literal["svg", "png"], *, width: float = 7.6) -> bytes:
    """The curves as a file, the most sensitive groups first and by name. Errors: MissingExtra without matplotlib."""
    palette = THEMED if kind == "svg" else PRINTED

    def draw(axes: Axes) -> None:
        axes.axhline(base, color=palette.dense, linewidth=1.0, linestyle=(0, (4, 3)))
        for number, (name, curve) in reversed(list(enumerate(curves))):
            x, y = [0.0, *(100 * share for share, _ in curve)], [base, *(value for _, value in curve)]
            named = number < _NAMED
            color = f"C{number}" if named else palette.grid
            axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=3, label=name if named else None)
        axes.set_xlabel("removed of one group, %")
        axes.set_ylabel("quality")
        axes.grid(color=palette.grid, linewidth=0.8)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return png(draw, width, 3.6) if kind == "png" else alone(figure("scan", draw, width, 3.6)).encode()
