"""The text of the demo: sections that are sections, and a held-out part that nothing has seen."""

from __future__ import annotations

import pytest

from prunella.app.demo import text
from prunella.app.demo.text import TextSection, read_sections, split


@pytest.fixture(scope="module")
def sections() -> tuple[TextSection, ...]:
    return read_sections()


def test_there_are_enough_sections_and_each_is_there_once(sections: tuple[TextSection, ...]) -> None:
    assert len(sections) > 100
    assert len({section.first for section in sections}) == len(sections)
    assert all(len(s.first.split()) >= 4 and len(s.rest.split()) >= 15 for s in sections)


def test_the_query_is_not_in_the_document(sections: tuple[TextSection, ...]) -> None:
    assert not [s.title for s in sections if s.first in s.rest]


def test_no_sentence_of_the_held_out_part_is_in_a_passage(sections: tuple[TextSection, ...]) -> None:
    corpus = split(sections)
    held_out = {sentence for s in corpus.held_out for sentence in text._sentences(f"{s.first} {s.rest}")}
    seen = {sentence for passage in corpus.passages for sentence in text._sentences(passage)}
    assert seen
    assert not seen & held_out


def test_a_sentence_that_two_sections_share_stays_out_of_the_passages() -> None:
    both = "Nothing else in the language does this at all."
    made = tuple(TextSection(str(i), f"Query number {i}.", f"{both} Own text of section {i}.") for i in range(10))
    corpus = split(made, held_out=0.5)
    assert len(corpus.held_out) == 5
    assert sorted(p for p in corpus.passages if both in p) == []
    assert sum("Own text" in passage for passage in corpus.passages) == 5


def test_the_seed_decides_the_split(sections: tuple[TextSection, ...]) -> None:
    assert split(sections, seed=1) == split(sections, seed=1)
    assert split(sections, seed=1).held_out != split(sections, seed=2).held_out


def test_passages_are_short_and_long(sections: tuple[TextSection, ...]) -> None:
    words = sorted(len(passage.split()) for passage in split(sections).passages)
    assert words[len(words) // 5] <= 20
    assert words[-len(words) // 5] >= 35


def test_sentences_joined_are_the_text() -> None:
    assert text._sentences('One is here. "Two" follows: Three ends') == ["One is here.", '"Two" follows:', "Three ends"]
    assert text._sentences("e.g. this is one") == ["e.g. this is one"]


def test_headings_and_entries_are_cut() -> None:
    source = "Title\n=====\n\nBody of it.\n\nobject.__len__(self)\n\n   Called to do this.\n\nOther\n-----\n\nEnd."
    assert [title for title, _ in text._cut(source)] == ["Title", "object.__len__(self)", "Other"]
    assert [body.split()[0] for _, body in text._cut(source)] == ["Body", "Called", "End."]
