"""A part of a report that something else writes: a heading, a sentence, a table, charts."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Section:
    """header and rows: text, escaped on the page; the first column names the row. charts: wide and narrow."""

    title: str
    lead: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    charts: tuple[Markup, ...] = ()

    def __str__(self) -> str:
        table = (self.header, *self.rows) if self.rows else ()
        widths = [max(len(row[i]) for row in table) for i in range(len(self.header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([self.title, self.lead, *lines])
