"""Concepts of the field, by the words that people search for, with the names to type in Python.

`concepts.toml` is written by `python docs/concept_table.py --package` from the rows of the documentation.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

_NO_MATCH = 7


@dataclass(frozen=True)
class Concept:
    """A row. words: what other tools and papers call it. python: names to type. page: of the documentation."""

    name: str
    words: tuple[str, ...]
    python: tuple[str, ...]
    page: str

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """The name and the words as they are compared."""
        return tuple(_plain(name) for name in (self.name, *self.words))

    @cached_property
    def full_titles(self) -> frozenset[str]:
        """The titles, with and without what stands in brackets at their end."""
        return frozenset(self.titles) | {_without_brackets(title) for title in self.titles}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The titles and the names to type."""
        return tuple(map(_plain, _names(self)))


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts, in the order of the documentation."""
    text = resources.files("prunella.registry").joinpath("concepts.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["concept"]
    return tuple(Concept(row["name"], tuple(row["words"]), tuple(row["python"]), row["page"]) for row in rows)


def search(text: str) -> list[Concept]:
    """The concepts whose name or words contain a text, those with the text as a full name first."""
    wanted = _plain(text)
    if not wanted:
        return []
    whole = re.compile(rf"(^|\W){re.escape(wanted)}(\W|$)")
    ranks = [(_rank(wanted, whole, concept), concept) for concept in concepts()]
    return [concept for rank, concept in sorted(ranks, key=lambda pair: pair[0]) if rank < _NO_MATCH]


def pages_of(method: str) -> tuple[str, ...]:
    """The sections of the documentation on the concepts that a method belongs to."""
    rows = [row for row in concepts() if any(name.rpartition(".")[2] == method for name in row.python)]
    return tuple(row.page for row in rows if row.page.startswith("concepts/"))


def near(text: str) -> list[str]:
    """Words of concepts that resemble a text."""
    known = {_plain(word): word for concept in concepts() for name in _names(concept) for word in (name, *name.split())}
    return [known[word] for word in difflib.get_close_matches(_plain(text), known, 3, 0.75)]


def _rank(wanted: str, whole: re.Pattern[str], concept: Concept) -> int:
    """The rank of a match: full names and words of a concept, then a part of its name, of its words, of its Python."""
    name = concept.titles[0]
    if wanted in (name, _without_brackets(name)):
        return 0
    if wanted in concept.full_titles:
        return 1
    if not any(wanted in text for text in concept.names):
        parts = wanted.split()
        spread = len(parts) > 1 and all(any(part in text for text in concept.names) for part in parts)
        return 6 if spread else _NO_MATCH
    for rank, texts in ((2, (name,)), (3, concept.titles), (4, concept.names)):
        if any(map(whole.search, texts)):
            return rank
    return 5 if len(wanted) > 2 else _NO_MATCH


def _without_brackets(title: str) -> str:
    return re.sub(r"\s*\(.*\)$", "", title)


def _names(concept: Concept) -> tuple[str, ...]:
    return (concept.name, *concept.words, *(name.rpartition(".")[2] for name in concept.python))


@cache
def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip().lower()
