"""Sizes in plain containers: lists, tuples and dictionaries of integers, also inside each other and beside names.

A size has the number of its place among all integers of the container, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

_PLAIN = (list, tuple, dict)
_DEPTH = 3


def sizes_in(value: object) -> tuple[int, ...]:
    """The integers of a container of integers and names, in order; empty for anything else."""
    found: list[int] = []
    whole = type(value) in _PLAIN and _collect(value, found, 0)
    return tuple(found) if whole else ()


def is_nested(value: object) -> bool:
    """Whether there is more than one plain list or tuple of integers to it."""
    kind = type(value)  # a proxy of what is gone refuses `isinstance`
    parts = list(value) if issubclass(kind, list | tuple) else []  # type: ignore[call-overload]
    return issubclass(kind, dict) or any(type(part) in _PLAIN for part in parts)


def content(value: object) -> tuple[int | str, ...]:
    """The names and integers of a container in order: the same for a dictionary as for the pairs of it."""
    if isinstance(value, dict):
        return tuple(part for pair in value.items() for entry in pair for part in content(entry))
    if isinstance(value, list | tuple):
        return tuple(part for entry in value for part in content(entry))
    return (value,) if isinstance(value, int | str) else ()


def changed(value: Any, change: Callable[[int, int], int]) -> Any:
    """The container with `change(place, size)` in the place of every size."""
    places = count()

    def rebuilt(part: Any) -> Any:
        if type(part) is dict:
            return {key: rebuilt(entry) for key, entry in part.items()}
        if type(part) in (list, tuple):
            return type(part)(rebuilt(entry) for entry in part)
        return change(next(places), part) if isinstance(part, int) else part

    return rebuilt(value)


def _collect(value: object, found: list[int], depth: int) -> bool:
    if type(value) is int:
        found.append(value)
        return True
    if depth > _DEPTH or type(value) not in _PLAIN:
        return type(value) is str
    parts = list(value.values()) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
    return all(_collect(part, found, depth + 1) for part in parts)
