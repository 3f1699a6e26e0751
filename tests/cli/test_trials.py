"""`prunella pareto` from its words to its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

PARTS = "tests.experiments.experiment_parts"
WORDS = ("pareto", f"{PARTS}:make", "--metric", f"{PARTS}:evaluate", "--inputs", f"{PARTS}:example")


def test_a_study(prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = (*WORDS, "--recipe", "lamp_magnitude", "--ratios", "2,30", "--seeds", "1", "-o", "out", "--json")
    done = prunella(*words)
    assert done.code == 0 and "9 of 9" in done.err
    assert len(done.data["points"]) == 8 and (tmp_path / done.data["page"]).is_file()
    assert {cell["error"].split(":")[0] for cell in done.data["cells"]} == {"", "TargetMissed"}
    again = prunella(*words)
    assert again.data == done.data and "of 9" not in again.err  # nothing was left to do


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratios", "two"), "cannot read the ratios"),
        (("--unit", "kg"), "cannot read the target"),
        (("--recipe", "lemp_magnitude"), "lamp_magnitude"),
        (("--metric", f"{PARTS}:nothing"), "nothing"),
    ],
)
def test_misuse(
    prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = prunella(*WORDS, *words)
    assert done.code == 2 and said in done.err
