"""Help is quick: torch stays out, and so does what typer loads only to parse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from prunella.cli.app import app
from tests.cli.conftest import Run

VERBS = ("demo", "doctor", "methods", "explain", "inspect", "scan", "plan", "import", "show", "run", "llm",
         "eval", "chat", "pareto", "compare", "bench", "export", "verify", "report")  # fmt: skip
HEAVY = ("torch", "numpy", "scipy", "rich", "matplotlib", "pydantic", "transformers")
MOST = 3


def test_the_verbs() -> None:
    assert tuple(typer.main.get_command(app).commands) == VERBS  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_described_options(prunella: Run, verb: str) -> None:
    result = prunella(verb, "--help")
    assert result.code == 0 and result.err == "" and "--json" in result.out
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.help and [p.name for p in command.params if not p.help] == []


def test_help_of_the_program_names_every_verb(prunella: Run) -> None:
    text = prunella("--help").out
    assert [verb for verb in VERBS if f"\n  {verb} " not in text] == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom prunella.cli import main\n"
        f"for words in [['--help'], *([verb, '--help'] for verb in {VERBS})]:\n"
        "    try: main(words)\n    except SystemExit as end: assert not end.code, words\n"
        f"    found = [name for name in {HEAVY} if name in sys.modules]\n    assert not found, (words, found)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [("--help",), ("run", "--help")])
def test_help_takes_little_more_than_its_parser(words: tuple[str, ...]) -> None:
    """Processor time beside that of importing typer alone, in turn, the best of a few: no machine is too slow."""
    pairs = [(_seconds("-m", "prunella", *words), _seconds("-c", "import typer")) for _ in range(5)]
    ours, parser = (min(times) for times in zip(*pairs, strict=True))
    assert ours < MOST * parser


def _seconds(*words: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
