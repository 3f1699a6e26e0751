"""Tables for other programs: CSV, LaTeX, and HTML for notebooks. What is written is text; nothing in it is obeyed."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Collection, Sequence

from prunella.errors import printable

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "–": "--", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a header; a text that a spreadsheet would run as a formula is quoted by `'`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return text.getvalue()


def _harmless(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def latex_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[int] = ()) -> str:
    """A `tabular` with the rules of booktabs. right: the columns of numbers."""
    columns = "".join("r" if place in right else "l" for place in range(len(header)))
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (header, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}  % needs \usepackage{{booktabs}}", *body, r"\end{tabular}", ""])


def _latex(cell: object) -> str:
    return re.sub(r"[\\{}$&#%_^~±–<>]", lambda match: _LATEX[match[0]], printable(" ".join(str(cell).split())))


def html_table(
    head: str, header: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = (), *, most: int = 60
) -> str:
    """A heading, a table and lines below it, all of it escaped; of a long table the first rows."""
    shown = list(rows[:most])
    more = [f"and {len(rows) - most} more rows: print it"] if len(rows) > most else []
    cells = "".join(f"<tr>{_cells('td', row)}</tr>" for row in shown)
    lines = "".join(f"<div>{_escaped(note)}</div>" for note in (*more, *notes) if note)
    table = f"<table><thead><tr>{_cells('th', header)}</tr></thead><tbody>{cells}</tbody></table>"
    return f"<div><b>{_escaped(head)}</b>{table}{lines}</div>"


def _cells(tag: str, row: Sequence[object]) -> str:
    return "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in row)


def _escaped(cell: object) -> str:
    return html.escape(printable(str(cell)))
