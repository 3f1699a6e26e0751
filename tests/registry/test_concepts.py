"""The concepts that `prunella explain` finds are those of the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from prunella.registry.concepts import concepts, near, search

ROOT = Path(__file__).resolve().parents[2]


def test_the_packaged_table_is_that_of_the_documentation() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "concept_table.py"))
    packaged = (ROOT / "src" / "prunella" / "registry" / "concepts.toml").read_text(encoding="utf-8")
    assert packaged == table["packaged"](table["read"]()), "run python docs/concept_table.py --package"


def test_every_concept_is_found_by_each_of_its_words() -> None:
    for concept in concepts():
        for word in (concept.name, *concept.words):
            assert concept in search(word)


@pytest.mark.parametrize(("text", "name"), [("lotery ticket", "lottery ticket"), ("distilation", "distillation")])
def test_a_misspelled_word_has_near_ones(text: str, name: str) -> None:
    assert name in [word.lower() for word in near(text)] and not search(text)


def test_an_exact_name_comes_first_and_nothing_finds_nothing() -> None:
    assert search("distill")[0].name == "distill"
    assert search("RigL")[0].name == "RigL"
    assert not search(" ") and not search("no such thing")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FLOPs", "MACs"),
        ("flops", "MACs"),
        ("2:4", "N:M"),
        ("gradual", "Gradual cubic pruning (AGP)"),
        ("calibration", "calibration data"),
    ],
)
def test_a_whole_word_of_a_concept_comes_before_names_that_hold_it(text: str, name: str) -> None:
    assert search(text)[0].name == name


def test_several_words_are_found_in_any_place() -> None:
    assert "schedule" in [concept.name for concept in search("gradual schedule")]
    assert not near("nonsense")
