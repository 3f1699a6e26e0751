"""Names have an example in their docstring, which runs and gives what it shows: all at first sight, many others."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch

import prunella as pr

FIRST_SIGHT = [n for n in pr.__all__ if not n.startswith("__") and not inspect.ismodule(getattr(pr, n))]
SPACES = {n: getattr(pr, n) for n in pr.__all__ if inspect.ismodule(getattr(pr, n))}
FURTHER = list({
    id(getattr(home, name)): f"{space}.{name}" for space, home in reversed(SPACES.items()) for name in dir(home)
    if name not in FIRST_SIGHT and "\nExample:\n" in (inspect.getdoc(getattr(home, name)) or "")
}.values())  # fmt: skip
"""One name for each; of two namespaces the first."""


def found(name: str) -> object:
    space, _, inner = name.rpartition(".")
    return getattr(SPACES[space] if space else pr, inner)


def example(name: str) -> doctest.DocTest:
    """The block after `Example:`, with nothing of the module it stands in: a reader copies it as it is."""
    text = inspect.getdoc(found(name)) or ""
    block = text.partition("\nExample:\n\n")[2].partition("\n\n")[0]
    return doctest.DocTestParser().get_doctest(block, {}, name, None, 0)


def test_first_sight_is_what_the_first_hour_needs() -> None:
    assert {"plan", "shrink", "Channel", "PruningError"} <= set(FIRST_SIGHT)
    assert 30 <= len(FIRST_SIGHT) <= 45


def test_most_of_what_users_meet_has_an_example() -> None:
    assert len(FIRST_SIGHT) + len(FURTHER) >= 120


@pytest.mark.parametrize("name", [*FIRST_SIGHT, *FURTHER])
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch.export warns of itself
def test_the_example_of_a_name_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    test = example(name)
    shown: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test, out=shown.append).failed
    assert not failed, "".join(shown)
    assert not list(tmp_path.iterdir()), "an example leaves no file behind"


@pytest.mark.parametrize("name", [*FIRST_SIGHT, *FURTHER])
def test_an_example_is_short_and_uses_its_name(name: str) -> None:
    statements = example(name).examples
    assert 2 <= len(statements) <= 8, f"pr.{name} has no `Example:` of 2 to 8 statements"
    assert any(f"pr.{name}" in statement.source for statement in statements)
    assert any(statement.want for statement in statements), "an example shows what comes out"
