"""State of a model outside its modules: in their classes, and in the source files of these classes."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from types import ModuleType
from typing import Any

from torch import nn

from prunella.model.executed import is_source

NUMBERS = (bool, int, float, str, type(None), tuple)
CONTAINERS = frozenset({dict, list, set, deque, OrderedDict, defaultdict})
"""Types with restored contents; hooks are in an `OrderedDict`."""
_LARGEST = 10_000
"""Longer containers count as data, not as state."""
_MISSING = object()


def beside(model: nn.Module) -> list[type | ModuleType]:
    """The classes of the model's own modules, with their bases, and their source files."""
    bases = {base for kind in {type(module) for module in model.modules()} for base in kind.__mro__}
    files = {base: sys.modules.get(base.__module__) for base in bases}
    own = {base: file for base, file in files.items() if file and is_source(getattr(file, "__file__", None) or "<")}
    return [*own, *dict.fromkeys(own.values())]


def values_beside(model: nn.Module) -> Iterator[Any]:
    """Containers in these classes and files, and objects of the classes of these files."""
    holders = beside(model)
    files = {holder.__name__ for holder in holders if isinstance(holder, ModuleType)}
    for holder in holders:
        for name, value in vars(holder).copy().items():
            if name.startswith("__"):  # `__builtins__` are those of the process
                continue
            if (type(value) in CONTAINERS and len(value) <= _LARGEST) or type(value).__module__ in files:
                yield value


def is_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a namespace holds the same objects under the same names: after most runs it does, and this is quick."""
    return now.keys() == before.keys() and all(map(is_, now.values(), before.values()))


def undo_numbers(model: nn.Module) -> list[Callable[[], None]]:
    """Functions that restore the plain numbers in these classes and files."""
    return [_undo(holder) for holder in beside(model)]


def _undo(holder: type | ModuleType) -> Callable[[], None]:
    before = vars(holder).copy()
    numbers = {name: value for name, value in before.items() if isinstance(value, NUMBERS)}

    def undo() -> None:
        if is_same(vars(holder).copy(), before):
            return
        for name, value in vars(holder).copy().items():
            if isinstance(value, NUMBERS) and name not in numbers and not name.startswith("__"):
                delattr(holder, name)
        for name, value in numbers.items():
            if vars(holder).get(name, _MISSING) is not value:
                setattr(holder, name, value)

    return undo
