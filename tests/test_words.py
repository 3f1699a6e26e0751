"""Words that the library gave up stay away from code, messages and docs: one vocabulary, that of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READ = [
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "notebooks").glob("*.py"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
GIVEN_UP = {
    "torch's spelling": r"artefact|enalis|[Nn]ormalis(e|ing)(?!\": \"normalize)|uantis|ummaris|modelling",
    "plurals": r"\bcriterions\b",
    "planning": r"\bcontest\b|\bStopwatch\b|\bstays whole\b|\bkept whole\b",
    "recovery": r"--heal\b|\bheal_|\bto heal\b",
    "options": r"--windows\b|--length\b|--judged\b|--window\b",
    "inner words": r"\bspoilt\b|\bsown\b|_sieve\b|\btwins\b|\bdice\b(?!`|\" else)",
    "headings": r"Zeros that pay|What a unit is|How much each group gives|Fewer tokens, fewer|Training toward zeros",
}


@pytest.mark.parametrize("kind", GIVEN_UP)
def test_no_word_comes_back(kind: str) -> None:
    lines = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in READ
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(GIVEN_UP[kind], line)
    ]
    assert lines == []


def test_a_word_that_comes_back_is_seen() -> None:
    assert re.search(GIVEN_UP["torch's spelling"], "the artefact is normalised")
    assert not re.search(GIVEN_UP["torch's spelling"], '_KNOBS_OF_0_1 = {"normalise": "normalize"}')
