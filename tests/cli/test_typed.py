"""What is typed on the command line for a name of Python is an option or a verb that exists."""

from __future__ import annotations

import pytest
import typer

from prunella.cli.app import app
from prunella.cli.typed import typed
from prunella.registry.concepts import concepts


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pr.Threshold(0.01)", "--threshold 0.01"),
        ("pr.MACs(0.5)", "--target macs=0.5"),
        ("pr.NM(1, 4)", "--pattern 1:4"),
        ("pr.Block(2, 8)", "--pattern 2x8"),
        ("ratios=", "--ratio"),
        ("pr.criteria.wanda", "--recipe wanda"),
        ("pr.Channel", "--granularity channel"),
        ("pr.prune", "prunella run"),
    ],
)
def test_names_of_python(name: str, line: str) -> None:
    assert typed([name]) == [line]


def test_a_name_without_an_option_gives_nothing() -> None:
    assert typed(["pr.train.RigL", "pr.Plan", "data"]) == []


def test_every_line_of_the_concepts_names_an_option_or_a_verb_that_exists() -> None:
    group = typer.main.get_command(app)
    verbs = group.commands  # type: ignore[attr-defined]
    options = {text for verb in verbs.values() for parameter in verb.params for text in parameter.opts}
    for concept in concepts():
        for line in typed(concept.python):
            words = line.split()
            if words[0] == "prunella":
                assert words[1] in verbs
            assert [word for word in words if word.startswith("--") and word not in options] == []
