"""Sizes that the model's source names: numbers in the functions that read a size of an input, and keys of tables.

A comparison of sizes is recorded, so its other side can be tried. A lookup in a table, or a call of a Python function,
shows no comparison; there the numbers named by the source are the sizes at which it may take another path.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

from prunella.graph.trace.scopes import FunctionScope, scopes
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
"""Names of numeric functions, which turn a tracked size into a plain number."""


@dataclass
class KnownSizes:
    """numbers: constants. keys: numbers in containers. escaped: a size was used in a way that cannot be followed.

    ranks, layouts: the source asked for the number of axes of a tensor, or for its order in memory.
    """

    numbers: set[int] = field(default_factory=set)
    keys: set[int] = field(default_factory=set)
    escaped: bool = False
    ranks: bool = False
    layouts: bool = False
    codes: set[CodeType] = field(default_factory=set)

    def note(self, start: FrameType | None, *, escaped: bool = False, parts: bool = False, loops: bool = False) -> None:
        """Record the numbers named by the function that is reading the size of an input.

        parts: it takes positions apart; their number is a size if they are counted, or a loop runs over them. loops:
        they are positions of an input, so that a loop in the function may run over them.
        """
        frame = reader(start)
        if frame is None or (parts and not _counts(start, frame) and not (loops and _loops(frame.f_code))):
            return
        code = frame.f_code
        self.escaped |= escaped or parts or bool(_OF_NUMBERS.intersection(code.co_names))
        if code not in self.codes:
            self.codes.add(code)
            for scope in scopes(frame):
                self.numbers |= {n for n in constants(scope.code) if _LEAST <= n <= _LARGEST}
                for value in scope.named():
                    self.numbers |= {n for n in _integers(value) if _LEAST <= n <= _LARGEST}
                    self.keys |= {n for n in _entries(value) if 0 < n <= _LARGEST}

    def asks(self, start: FrameType | None, *, ranks: bool = False, layouts: bool = False) -> None:
        """Record that the source itself reads ranks or layouts."""
        if reader(start) is not None:
            self.ranks |= ranks
            self.layouts |= layouts

    def counted(self, start: FrameType | None) -> None:
        """Record that a function that has the shape of an input counts something: it may be the number of axes."""
        frame = reader(start)
        self.ranks |= frame is not None and "len" in frame.f_code.co_names


def origin(size: object, start: FrameType | None) -> str:
    """The origin of a plain size: a container that the running function or a callee names, or a literal."""
    frame = start
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    if frame is not None and size not in set(constants(frame.f_code)):
        for scope in scopes(frame):
            for name, value in scope.containers():
                if size in _held(value):
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


@cache
def _loops(code: CodeType) -> bool:
    """Whether a function, or one that is written in it, has a loop over items."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return any(entry.opname == "FOR_ITER" for entry in dis.get_instructions(code)) or any(map(_loops, inner))


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


def known_numbers(frame: FrameType) -> tuple[int | float, ...]:
    """The numbers that a running function knows, and the functions that it may call: constants, and what they name."""
    near = scopes(frame)
    parts = [number for scope in near for number in _fractions(scope)]
    return tuple(dict.fromkeys([*(n for scope in near for n in numbers_of(scope)), *parts]))


def _fractions(scope: FunctionScope) -> Iterator[float]:
    """Fractions between zero and one."""
    for value in (*_nested(scope.code), *scope.named()):
        if isinstance(value, float) and 0 < abs(value) < 1:
            yield value


def _nested(code: CodeType) -> Iterator[Any]:
    """The constants of a function and of those that are written in it."""
    for constant in code.co_consts:
        yield from _nested(constant) if isinstance(constant, CodeType) else (constant,)


def numbers_of(scope: FunctionScope) -> Iterator[int]:
    """The integers in the constants of one function and in what it names."""
    yield from constants(scope.code)
    for value in scope.named():
        yield from (*_integers(value), *_entries(value))


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
