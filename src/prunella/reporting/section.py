"""A part of a report that something else writes: a heading, a sentence, a table, charts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunella.measure.text import table

if TYPE_CHECKING:
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
        lines = [table(self.header, self.rows)] if self.rows else []
        return "\n".join([self.title, self.lead, *lines])
