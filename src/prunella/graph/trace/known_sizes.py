"""Sizes that the model's source knows: numbers in the functions that ask for a size of an input, and keys of tables.

A comparison of sizes is recorded and can be turned. What is looked up in a table, or passed to a function of Python,
cannot; there the numbers that the source names are the sizes at which it may do something else.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor, nn

from prunella.graph.trace.source import LIBRARY, reader
from prunella.graph.trace.tracked_int import plain

_LEAST = 4
"""Smaller numbers are axes and counts; sizes near the example's are tried anyway."""
_LARGEST = 4096
_LONGEST = 64
"""Longer containers are data, not a choice among sizes."""
_SHORT = 16
_TEXT = re.compile(r"\d{1,4}")
_OF_NUMBERS = frozenset({"math", "numpy", "np", "log2", "sqrt"})
"""Names of functions of numbers, which a size leaves as a plain number."""


@dataclass
class KnownSizes:
    """numbers: constants. keys: numbers in containers. escaped: a size was used in a way that cannot be followed."""

    numbers: set[int] = field(default_factory=set)
    keys: set[int] = field(default_factory=set)
    escaped: bool = False
    codes: set[CodeType] = field(default_factory=set)

    def note(self, start: FrameType | None, *, escaped: bool = False, parts: bool = False) -> None:
        """Record what the function knows that reads the size of an input now.

        parts: it takes the positions apart; their number is a size if they are counted, or a loop runs over them.
        """
        frame = reader(start)
        if frame is None or (parts and not _counts(start, frame)):
            return
        code = frame.f_code
        self.escaped |= escaped or parts or bool(_OF_NUMBERS.intersection(code.co_names))
        if code not in self.codes:
            self.codes.add(code)
            self.numbers |= {n for n in constants(code) if _LEAST <= n <= _LARGEST}
            for value in _named(frame):
                self.numbers |= {n for n in _integers(value) if _LEAST <= n <= _LARGEST}
                self.keys |= {n for n in _entries(value) if 0 < n <= _LARGEST}


def origin(size: object, start: FrameType | None) -> str:
    """Where a plain size comes from: a container of the module that runs, or the source."""
    frame = start
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    own = _owner(frame) if frame is not None else None
    if frame is not None and own is not None and size not in set(constants(frame.f_code)):
        for name in frame.f_code.co_names:
            value = _attribute(own, name)
            if isinstance(value, dict | list | tuple) and size in _held(value):
                return f"in the {type(value).__name__} {name}, which no cut changes"
    return "typed into the source"


def _held(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> set[int]:
    """The integers of a container, those in the values of a dictionary."""
    return set(_entries(list(value.values()) if isinstance(value, dict) else value))


def _counts(start: FrameType | None, frame: FrameType) -> bool:
    while start is not None and start is not frame:
        if start.f_code.co_name == "__iter__":
            return True
        start = start.f_back
    return "len" in frame.f_code.co_names


def constants(code: CodeType) -> Iterator[int]:
    """The integers in the constants of a function, at its numbers, in its tuples and as text, such as `"16x16"`."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from constants(constant)
        else:
            yield from _integers(constant)
            yield from _entries(constant)
            if isinstance(constant, str) and len(constant) <= _SHORT:
                yield from map(int, _TEXT.findall(constant))


def known_numbers(frame: FrameType) -> tuple[int, ...]:
    """The integers that a running function knows: its constants, and those of what it names."""
    named = (number for value in _named(frame) for part in (_integers(value), _entries(value)) for number in part)
    return tuple(dict.fromkeys([*constants(frame.f_code), *named]))


def _integers(value: Any) -> Iterator[int]:
    """The integers at a number."""
    if isinstance(value, float) and abs(value) <= _LARGEST:
        yield from {int(value), int(value) + 1}
    elif isinstance(value, int) and not isinstance(value, bool):
        yield plain(value)


def _entries(value: Any) -> Iterator[int]:
    """The integers in a container: the keys of a dictionary, or entries of one or two levels."""
    if isinstance(value, dict | set | frozenset | list | tuple) and len(value) <= _LONGEST:
        for entry in value:
            yield from _integers(entry)
            if isinstance(entry, tuple):
                yield from (n for part in entry for n in _integers(part))


def _named(frame: FrameType) -> Iterator[Any]:
    """The values that the function names: globals, locals, attributes of its module and class, and of objects there."""
    names, own = frame.f_code.co_names, _owner(frame)
    attributes = [_attribute(own, name) for name in names] if own is not None else []
    holders = [value for value in attributes if hasattr(value, "__dict__") and not isinstance(value, _NO_HOLDERS)]
    yield from (frame.f_globals[name] for name in names if name in frame.f_globals)
    yield from attributes
    yield from (_attribute(holder, name) for holder in holders for name in names)
    yield from (value for value in frame.f_locals.values() if isinstance(value, dict | set | frozenset))


_NO_HOLDERS = (nn.Module, Tensor, type, FunctionType, property, staticmethod, classmethod)


def _owner(frame: FrameType) -> nn.Module | None:
    """The module whose method runs: the first argument, whatever its name."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) else None


def _attribute(owner: object, name: str) -> Any:
    """An attribute of an object or of its class, without running anything."""
    return inspect.getattr_static(owner, name, None)
