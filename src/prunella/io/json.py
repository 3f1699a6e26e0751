"""The reader and the writer of all JSON. Files are untrusted: size, depth, keys and types are checked.

    fields = read_object(folder / "manifest.json")
    fields.integer("format", low=1)             # BadInput names the file, the key, what was found and expected
    fields.section("origin").text("kind")

The reader refuses text that is too long or too deep, would take too much memory, is not UTF-8, continues after its end,
holds a key twice or a key with half a character, or holds NaN or infinity. NaN and infinity are not JSON, but Python
writes them; `allow_nan` accepts them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunella.errors import BadInput
from prunella.io.files import reading, write_atomic
from prunella.io.kind_of_path import refuse_other_kind
from prunella.io.untrusted import check_regular

LARGEST = 32_000_000
"""Most bytes of a text. A header of safetensors takes 150 bytes for a tensor, an index 100."""
MOST_MEMORY = 120_000_000
"""Most bytes that a text and its values may take in memory, by the estimate of `memory_of`."""
LARGEST_CONFIG = 10_000_000
"""Most bytes of a configuration."""
_MOST_DIGITS = 1000
"""Most digits of an integer: the time to read one grows with the square of its digits."""
DEEPEST = 100
"""Deepest nesting of lists and objects."""


def decode(text: bytes | str, *, largest: int = LARGEST, deepest: int = DEEPEST, allow_nan: bool = False) -> Any:
    """The value of a JSON text. Errors: ValueError, with the reason as its text."""
    if len(text) > largest:
        raise ValueError(f"{len(text)} bytes where at most {largest} are read")
    options: dict[str, Any] = {} if allow_nan else {"parse_constant": _no_constant, "parse_float": _finite_number}
    options |= {"object_pairs_hook": _unique, "parse_int": _integer}
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        check_memory(plain)
        value = json.loads(plain, **options)
    except RecursionError:
        raise ValueError("lists or objects are too deep inside each other") from None
    check_depth(value, deepest)
    return value


def memory_of(text: str) -> int:
    """An upper estimate of the bytes that a JSON text and its values take while it is read."""
    values, keys, lists, objects = (text.count(mark) for mark in ",:[{")
    return 2 * sys.getsizeof(text) + 48 * values + 160 * keys + 72 * lists + 240 * objects


def check_memory(text: str) -> None:
    """Errors: ValueError if the values of a text would take too much memory; nothing is parsed."""
    if (needed := memory_of(text)) > MOST_MEMORY:
        raise ValueError(f"about {needed} bytes of memory for its values, where at most {MOST_MEMORY} are taken")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict[str, Any]()
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key!r:.60} is there twice")
        if not _is_unicode(key):
            raise ValueError(f"the key {key!r:.60} holds half a character")
        fields[key] = value
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def check_depth(value: Any, deepest: int = DEEPEST) -> None:
    """Errors: ValueError if lists and objects are nested more than `deepest` times."""
    level = [value]
    for _ in range(deepest + 1):
        outer = [item for item in level if isinstance(item, dict | list)]
        if not outer:
            return
        level = [item for holder in outer for item in _items(holder)]
    raise ValueError(f"more than {deepest} lists or objects are inside each other")


def _items(holder: dict[str, Any] | list[Any]) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


# -- typed reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A value of a JSON text. what: the first line of errors, which names the file; at: the keys that lead to it."""

    data: Any
    what: str
    todo: str = ""
    at: str = ""

    def text(self) -> str:
        """A string that UTF-8 can hold."""
        if not isinstance(self.data, str) or not _is_unicode(self.data):
            raise self.refused("text")
        return self.data

    def integer(self, *, low: int | None = None, high: int | None = None) -> int:
        """A whole number from `low` to `high`; neither a boolean nor 3.0."""
        wanted = _wanted("a whole number", low, high)
        if type(self.data) is not int or not _within(self.data, low, high):
            raise self.refused(wanted)
        return self.data

    def number(self, *, low: float | None = None, high: float | None = None) -> float:
        """A number from `low` to `high`."""
        if type(self.data) not in (int, float) or not _within(self.data, low, high):
            raise self.refused(_wanted("a number", low, high))
        try:
            return float(self.data)
        except OverflowError:
            raise self.refused("a number that a float can hold") from None

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.data, bool):
            raise self.refused("true or false")
        return self.data

    def items(self, count: int | None = None) -> tuple[Value, ...]:
        """The items of a list, `count` of them if it is given."""
        if not isinstance(self.data, list) or count not in (None, len(self.data)):
            raise self.refused("a list" if count is None else f"a list of {count}")
        return tuple(Value(item, self.what, self.todo, f"{self.at}[{i}]") for i, item in enumerate(self.data))

    def integers(self, *, low: int | None = None, high: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers from `low` to `high`."""
        return tuple(item.integer(low=low, high=high) for item in self.items())

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(item.text() for item in self.items())

    def fields(self) -> Fields:
        """An object."""
        if not isinstance(self.data, dict):
            raise self.refused("an object")
        return Fields(self.data, self.what, self.todo, self.at)

    def refused(self, expected: str) -> BadInput:
        """The error for a value of another kind than expected."""
        return BadInput(self.what, f"{self.at or 'it'} is {_shown(self.data)}, not {expected}", self.todo)


@dataclass(frozen=True)
class Fields:
    """An object of a JSON text. Errors: BadInput with the file, the key, the actual value and the expected kind.

    `name in fields` is true for a key with a value other than null. A getter returns its `default` for other keys.
    """

    data: Mapping[str, Any]
    what: str
    todo: str = ""
    at: str = ""

    def __contains__(self, key: object) -> bool:
        return self.data.get(key) is not None  # type: ignore[call-overload]

    def value(self, key: str) -> Value:
        """The value of a required key."""
        at = f"{self.at}.{key}" if self.at else key
        if key not in self.data:
            raise BadInput(self.what, f"{at} is missing", self.todo)
        return Value(self.data[key], self.what, self.todo, at)

    def values(self) -> Iterator[tuple[str, Value]]:
        """Keys and values, for objects with arbitrary keys."""
        return ((key, self.value(key)) for key in self.data)

    def text(self, key: str, *, default: str | None = None) -> str:
        """A string."""
        return default if default is not None and key not in self else self.value(key).text()

    def integer(self, key: str, *, low: int | None = None, high: int | None = None, default: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        missing = default is not None and key not in self
        return default if missing else self.value(key).integer(low=low, high=high)  # type: ignore[return-value]

    def number(self, key: str, *, low: float | None = None, high: float | None = None) -> float:
        """A number from `low` to `high`."""
        return self.value(key).number(low=low, high=high)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """True or false."""
        return default if default is not None and key not in self else self.value(key).flag()

    def list_of(self, key: str, *, default: tuple[Value, ...] | None = None) -> tuple[Value, ...]:
        """The items of a list."""
        return default if default is not None and key not in self else self.value(key).items()

    def section(self, key: str, *, optional: bool = False) -> Fields:
        """An object; an empty one if it is `optional` and missing."""
        return (
            Value({}, self.what, self.todo, key).fields() if optional and key not in self else self.value(key).fields()
        )

    def mapping(self, key: str, *, optional: bool = False) -> dict[str, Any]:
        """An object as plain data, for contents of another tool's format."""
        return dict(self.section(key, optional=optional).data)


def _wanted(kind: str, low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    return kind + (f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else "")


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return "null" if value is None else f"{value!r:.60}" if isinstance(value, str) else f"{json.dumps(value):.60}"


# -- files ------------------------------------------------------------------------------------------------------------


def parse(
    text: bytes | str,
    what: str,
    *,
    todo: str = "",
    allow_nan: bool = False,
    largest: int = LARGEST,
    deepest: int = DEEPEST,
) -> Value:
    """The value of a JSON text that is a part of a file. what: the first line of errors. Errors: BadInput."""
    try:
        return Value(decode(text, largest=largest, deepest=deepest, allow_nan=allow_nan), what, todo)
    except ValueError as error:
        raise BadInput(what, f"broken or cut short: {error}", todo) from error


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str = "",
    todo: str = "write it again",
    allow_nan: bool = False,
    largest: int = LARGEST,
) -> Value:
    """The value in a file. what: the first line of errors, "FILE cannot be read" by default.

    Errors: BadInput when the file cannot be read, or is not one JSON text as this module reads it.
    """
    file = Path(path)
    what = what or f"{file} cannot be read"
    with reading(file, what), check_regular(file, what).open("rb") as opened:
        text = opened.read(largest + 1)  # one byte more than allowed, also of an endless file
    try:
        return parse(text, what, todo=todo, allow_nan=allow_nan, largest=largest)
    except BadInput:
        refuse_other_kind(file, "json", what=what, give=todo)
        raise


def read_object(
    path: str | os.PathLike[str],
    *,
    what: str = "",
    todo: str = "write it again",
    allow_nan: bool = False,
    largest: int = LARGEST,
) -> Fields:
    """The object in a file. Errors: as `read_json`, and when it is not an object."""
    return read_json(path, what=what, todo=todo, allow_nan=allow_nan, largest=largest).fields()


def read_config(path: str | os.PathLike[str], *, todo: str = "give the complete folder") -> Fields:
    """The object in a config.json of transformers, which writes infinities as Python does. Errors: as `read_json`."""
    return read_object(path, todo=todo, allow_nan=True, largest=LARGEST_CONFIG)


def encode(value: Any, *, indent: int | None = 1, allow_nan: bool = False, sort: bool = True) -> str:
    """The value as JSON; equal data gives equal text. sort: by key, if the order of keys has no meaning.

    Errors: TypeError, ValueError when it is not JSON.
    """
    return json.dumps(value, indent=indent, sort_keys=sort, allow_nan=allow_nan)


def write_json(path: str | os.PathLike[str], value: Any, *, allow_nan: bool = False) -> Path:
    """Write a value to a file, atomically and durably.

    Errors: RequestError or OutOfResources when it cannot be written; TypeError, ValueError when it is not JSON.
    """
    return write_atomic(path, (encode(value, allow_nan=allow_nan) + "\n").encode())


def plain(value: object) -> Any:
    """A value as JSON data: numbers that are not finite become null, other objects become their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)
