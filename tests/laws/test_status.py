"""A method is called stable only where an oracle proves it and a table of results measures it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunella.registry.catalogue import methods
from prunella.registry.method import Method

DOCS = Path(__file__).parents[2] / "docs"
STABLE = [method for method in methods() if method.status == "stable"]
_NUMBER = re.compile(r"\d\.\d|\d %|\d%")


def proven() -> set[str]:
    """Names of functions that the table of concepts lists, each with its oracle tests."""
    files = sorted((DOCS / "concepts").glob("*.toml"))
    rows = [row for file in files for row in tomllib.loads(file.read_text(encoding="utf-8"))["concept"]]
    return {path.rpartition(".")[2] for row in rows if row["tests"] for path in row["functions"]}


def measured() -> Iterator[str]:
    """Rows with results in the tables of the documentation, but for the exam of the zoo, which names no method."""
    for page in sorted(DOCS.rglob("*.md")):
        if page.name != "zoo.md" and "methods" not in page.parts and "reference" not in page.parts:
            lines = page.read_text(encoding="utf-8").splitlines()
            yield from (line for line in lines if line.startswith("|") and _NUMBER.search(line))


PROVEN, MEASURED = proven(), list(measured())


def named(method: Method) -> bool:
    """Whether a row names the method: `group norm`, `SET`, `global_`, `LLM-Pruner`."""
    words = r"[ _-]".join(map(re.escape, method.name.split("_")))
    pattern = re.compile(rf"(?<![A-Za-z0-9_]){words}_?(?![A-Za-z0-9_])", re.IGNORECASE)
    return any(pattern.search(row) for row in MEASURED)


@pytest.mark.parametrize("method", STABLE, ids=lambda method: method.name)
def test_a_stable_method_is_proven_and_measured(method: Method) -> None:
    assert method.function.__name__ in PROVEN, "no row of docs/concepts has it"
    assert named(method), "no table of results names it"


def test_most_is_experimental_and_something_is_stable() -> None:
    assert 20 < len(STABLE) < len(methods()) / 2
