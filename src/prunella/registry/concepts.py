"""Concepts of the field, by the words that people search for, with the names to type in Python.

`concepts.toml` is written by `python docs/concept_table.py --package` from the rows of the documentation.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

_NO_MATCH = 6


@dataclass(frozen=True)
class Concept:
    """A row. words: what other tools and papers call it. python: names to type. page: of the documentation."""

    name: str
    words: tuple[str, ...]
    python: tuple[str, ...]
    page: str


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
    ranks = [(_rank(wanted, concept), concept) for concept in concepts()]
    return [concept for rank, concept in sorted(ranks, key=lambda pair: pair[0]) if rank < _NO_MATCH]


def near(text: str) -> list[str]:
    """Words of concepts that resemble a text."""
    known = {_plain(word): word for concept in concepts() for name in _names(concept) for word in (name, *name.split())}
    return [known[word] for word in difflib.get_close_matches(_plain(text), known, 3, 0.75)]


def _rank(wanted: str, concept: Concept) -> int:
    """The rank of a match: names and words of a concept first, full before partial matches, then Python names."""
    titles = [_plain(name) for name in (concept.name, *concept.words)]
    exact = [re.sub(r"\s*\(.*\)$", "", name) for name in titles]
    names = [_plain(name) for name in _names(concept)]
    if wanted in (titles[0], exact[0]):
        return 0
    if wanted in titles or wanted in exact:
        return 1
    whole = re.compile(rf"(^|\W){re.escape(wanted)}(\W|$)")
    if any(map(whole.search, titles)):
        return 2
    if any(map(whole.search, names)):
        return 3
    if len(wanted) > 2 and any(wanted in name for name in names):
        return 4
    parts = wanted.split()
    return 5 if len(parts) > 1 and all(any(part in name for name in names) for part in parts) else _NO_MATCH


def _names(concept: Concept) -> tuple[str, ...]:
    return (concept.name, *concept.words, *(name.rpartition(".")[2] for name in concept.python))


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip().lower()
