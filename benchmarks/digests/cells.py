"""A cell of `digests.py`, and the list of those that are functions of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A named result, made when it is asked for: a value, or parts by name."""

    name: str
    make: Callable[[], Any]


METHODS: list[Cell] = []


def cell(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Make a function a cell."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        METHODS.append(Cell(name, make))
        return make

    return add


def cells(name: str, each: Mapping[str, Any]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Make a function of one argument a cell for each argument."""

    def add(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        METHODS.extend(Cell(f"{name} / {kind}", partial(make, one)) for kind, one in each.items())
        return make

    return add
