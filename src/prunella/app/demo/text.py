"""Sections of Python's own language reference (`pydoc_data.topics`), split in calibration and held-out parts.

The topics quote each other ("compound" holds all of "if"), so sections are made unique first, and a paragraph that the
held-out part holds is never in the calibration part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

_MARK = re.compile(
    r"^(?P<title>\S[^\n]*)\n(?P<line>([*=\-~^])\3{2,})$"  # a heading and its underline
    r"|^(?P<entry>[A-Za-z_][\w. ]*\([^\n]*\))\n(?:[A-Za-z_][\w. ]*\([^\n]*\)\n)*(?=\n   \S)",  # name(...) and its text
    re.MULTILINE,
)
_SENTENCE = re.compile(r"(.+?[.:])\s+(?=[A-Z\"*(‘“])")
_MIN_WORDS = {"first": 4, "rest": 15}
_WORDS = (10, 20, 45, 90)
"""Most words of a passage, in turn."""


@dataclass(frozen=True)
class TextSection:
    """A section of the reference: its first sentence is the query for the rest."""

    title: str
    first: str
    rest: str


@dataclass(frozen=True)
class Corpus:
    """Passages for calibration and recovery, and held-out sections."""

    passages: tuple[str, ...]
    held_out: tuple[TextSection, ...]

    def first(self, count: int | None) -> Corpus:
        """At most `count` of both."""
        return Corpus(self.passages[:count], self.held_out[:count])


def read_sections() -> tuple[TextSection, ...]:
    """All sections of the installed Python's topics that have text after the first sentence, each once."""
    from pydoc_data.topics import topics

    sections: dict[str, TextSection] = {}
    for name in sorted(topics):
        for title, body in _cut(topics[name]):
            section = _section(title, body)
            if section:
                sections.setdefault(section.first, section)
    return tuple(sections.values())


def split(sections: tuple[TextSection, ...], *, held_out: float = 0.4, seed: int = 0) -> Corpus:
    """Shuffle by `seed`; the first `held_out` of the sections are kept apart, the others become passages.

    Passages have 10 to 90 words, since weights fitted only to long texts are wrong for short ones. Sentences that also
    occur in a held-out section are left out.
    """
    order = list(sections)
    random.Random(seed).shuffle(order)
    count = round(held_out * len(order))
    held_out_sections = tuple(order[:count])
    held_out_sentences = {
        sentence for section in held_out_sections for sentence in _sentences(f"{section.first} {section.rest}")
    }
    passages: list[str] = []
    for section in order[count:]:
        fresh = [s for s in _sentences(f"{section.first} {section.rest}") if s not in held_out_sentences]
        passages += _pack(fresh, len(passages))
    return Corpus(tuple(passages), held_out_sections)


def _cut(text: str) -> Iterator[tuple[str, str]]:
    marks = list(_MARK.finditer(text))
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        yield mark["title"] or mark["entry"], text[mark.end() : after.start() if after else len(text)]


def _section(title: str, body: str) -> TextSection | None:
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body) if "::=" not in p and ">>>" not in p]
    paragraphs = [p for p in paragraphs if len(p.split()) >= _MIN_WORDS["first"]]
    if not paragraphs:
        return None
    first, *others = _sentences(paragraphs[0])
    rest = " ".join([*others, *paragraphs[1:]])
    enough = len(first.split()) >= _MIN_WORDS["first"] and len(rest.split()) >= _MIN_WORDS["rest"]
    return TextSection(title, first, rest) if enough else None


def _sentences(text: str) -> list[str]:
    """Split after a full stop or colon before a capital; joining with spaces gives the text back."""
    ends = [m.end(1) for m in _SENTENCE.finditer(text)]
    return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if text[a:b].strip()]


def _pack(sentences: list[str], start: int) -> Iterator[str]:
    """Join neighboring sentences to passages of the lengths `_WORDS` in turn; each has at least one sentence."""
    held: list[str] = []
    for sentence in sentences:
        if held and sum(len(s.split()) for s in [*held, sentence]) > _WORDS[start % len(_WORDS)]:
            yield " ".join(held)
            held, start = [], start + 1
        held.append(sentence)
    if held:
        yield " ".join(held)
