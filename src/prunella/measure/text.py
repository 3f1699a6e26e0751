"""The writer of all text tables, and the format of all displayed numbers.

It is in `measure`, not in `reporting`, because `planning`, `lottery` and `llm` print tables too and import only parts
above them. Heavy modules are not imported; `rich` is imported by the first table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from prunella.errors import printable

_POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MISSING = "–"
"""Shown in place of a number that is not finite."""


def table(header: Sequence[object], rows: Sequence[Sequence[object]], *, right: Collection[int] = ()) -> str:
    """Aligned columns as plain text: no colors, no borders, no wrapping, on any terminal.

    header: names of the columns; an empty header omits the line. right: right-aligned columns of numbers. Columns are
    two spaces apart, by the display width of each character. No line ends in a space.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[_one_line(cell) for cell in line] for line in ([header] if header else []) + [*rows]]
    if not lines:
        return ""
    columns = [Text("\n".join(cells)) for cells in zip(*lines, strict=True)]  # Text: [brackets] are not markup
    grid = Table.grid(padding=(0, 2, 0, 0))
    for place in range(len(columns)):
        grid.add_column(justify="right" if place in right else "left", no_wrap=True)
    grid.add_row(*columns)  # one row of columns: a row for each line takes rich a millisecond
    width = sum(2 + max(map(cell_len, column.plain.split("\n"))) for column in columns)
    console = Console(width=width, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n"))


def _one_line(cell: object) -> str:
    return printable(" ".join(str(cell).expandtabs(1).splitlines()))


def fitted(text: str, width: int) -> str:
    """The lines of a text, no wider than a terminal: longer lines are cut and end in an ellipsis."""
    from rich.cells import cell_len, set_cell_size

    lines = text.split("\n")
    return "\n".join(x if cell_len(x) <= width else set_cell_size(x, max(width - 1, 0)).rstrip() + "…" for x in lines)


_PATH = re.compile(r"(?<![\w./~:\\-])(?:~?/|~\\|[A-Za-z]:[\\/])(?:[^\s/\\'\"<>|:;,()]+[/\\])+")


def without_folders(text: str) -> str:
    """The text with absolute paths cut to the names of their files, for records and reports that are passed on.

    Folders name people and machines.
    """
    return _PATH.sub("", text)


def file_name(path: str) -> str:
    """The path for a record that is passed on: of an absolute path only the last name, spaces in folders or not."""
    place = Path(path).expanduser()
    return place.name if place.is_absolute() else without_folders(path)


def significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits: `0.9132`."""
    return f"{value:.{digits}g}" if math.isfinite(value) else MISSING


def short_count(value: float) -> str:
    """Three significant digits and a suffix, whole below 1000: `11.7 M`, `999`."""
    if not math.isfinite(value):
        return MISSING
    for power, suffix in _POWERS:
        if abs(value) >= 0.9995 * power:
            return f"{_three(value / power)} {suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def exact_count(value: int) -> str:
    """Every digit, in groups of three: `11,689,512`."""
    return f"{value:,}"


def byte_size(value: float) -> str:
    """Bytes, by powers of 1000: `44.6 MB`, `12 B`."""
    text = short_count(value)
    return text if text == MISSING else f"{text}B" if " " in text else f"{text} B"


def duration(seconds: float) -> str:
    """`12.3 ms` below a second, `2.5 s`; from two of them on in the next unit: `5 min`, `33.1 h`, `33.1 days`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    unit, size = next(((unit, size) for unit, size in _LONG if seconds >= 2 * size), ("s", 1))
    return f"{seconds / size:.3g} {unit}"


_LONG = (("days", 86_400), ("h", 3600), ("min", 60))


def ratio(value: float) -> str:
    """A ratio as text: `1.62x`."""
    return f"{value:.2f}x" if math.isfinite(value) else MISSING


def percent(value: float, digits: int = 1) -> str:
    """A fraction: `49.1%`."""
    return f"{value:.{digits}%}" if math.isfinite(value) else MISSING


def interval(low: float, high: float, spec: str = ".4g") -> str:
    """The two ends, in one format: `[0.95, 1.06]`."""
    return f"[{low:{spec}}, {high:{spec}}]"


def spread(mean: float, deviation: float) -> str:
    """A mean and its deviation, if known: `3 ± 2.6`, `3`."""
    return f"{significant(mean)} ± {significant(deviation, 2)}" if math.isfinite(deviation) else significant(mean)


def change(before: str, after: str) -> str:
    """`4 -> 2`, or the text once where both are the same."""
    return before if before == after else f"{before} -> {after}"


def _three(value: float) -> str:
    """Three digits; those after the point stay, so that a column of them lines up."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
