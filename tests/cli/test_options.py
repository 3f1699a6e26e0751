"""Groups of options: what a verb takes as one value, the command line gives one by one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from prunella.cli.options import Seed, flat


@dataclass(frozen=True)
class Pair:
    """Two options."""

    first: Annotated[int, typer.Option(help="needed")]
    second: Annotated[int, typer.Option(help="2 if left out")] = 2


seen: list[object] = []


def verb(pair: Pair, seed: Seed = 7) -> None:
    """A verb with a group."""
    seen.append((pair, seed))


def test_a_group_is_made_of_the_options_of_its_fields() -> None:
    flat(verb)(first=1, second=5, seed=0)
    assert seen.pop() == (Pair(1, 5), 0)
    parameters = inspect.signature(flat(verb)).parameters
    assert list(parameters) == ["first", "second", "seed"]
    assert [p.default for p in parameters.values()] == [inspect.Parameter.empty, 2, 7]


def test_typer_reads_the_options_of_a_group() -> None:
    single = typer.Typer(add_completion=False)
    single.command()(flat(verb))
    with pytest.raises(SystemExit):
        single(["--first", "4"])
    assert seen.pop() == (Pair(4, 2), 7)
