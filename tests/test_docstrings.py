"""The extension that turns docstrings into Markdown for the API pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[1] / "docs" / "docstrings.py"


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameters_become_a_list(docstrings: ModuleType) -> None:
    text = "Does it.\n\nrate, steps: how fast. seed: of noise. Errors: none.\n\nIt is a sentence: no parameter."
    lines = docstrings.markdown(text, {"rate", "seed"}, "prunella.x").split("\n")
    assert [line for line in lines if line.startswith("- ")] == ["- `rate, steps`: how fast.", "- `seed`: of noise."]
    assert lines[-3:] == ["**Errors:** none.", "", "It is a sentence: no parameter."]


def test_examples_are_fenced_and_indented_items_are_not(docstrings: ModuleType) -> None:
    example = "Example:\n\n    >>> f(1)\n    2\n\n    >>> g()\n\n"
    text = f"Does it.\n\nseed: of noise,\n    and more.\n\n{example}Use: now. Avoid: then."
    made = docstrings.markdown(text, {"seed"}, "prunella.x")
    assert "```pycon\n>>> f(1)\n2\n\n>>> g()\n```" in made
    assert "- `seed`: of noise,\n    and more." in made
    assert made.endswith("**Use:** now. **Avoid:** then.")


def test_public_names_are_links_but_not_to_themselves(docstrings: ModuleType) -> None:
    shrink = "prunella.transform.shrink.shrink"
    assert docstrings.markdown("See `shrink`.", set(), "prunella.x") == f"See [`shrink`][{shrink}]."
    assert docstrings.markdown("See `pr.transform.carry_`, `x`.", set(), "prunella.x").count("][prunella.") == 1
    assert docstrings.markdown("See `shrink`.", set(), shrink) == "See `shrink`."
