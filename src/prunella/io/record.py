"""Dataclasses of plain fields from JSON: every field has its annotated type, and unknown fields are refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_LARGEST = int(sys.float_info.max)


def read_record(kind: type[T], data: Any) -> T:
    """The dataclass `kind` with the fields in `data`. Errors: ValueError names the field and its value."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} is {_shown(data)}, not an object")
    hints: dict[str, tuple[Any, bool]] = _hints(kind)  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in data if key not in hints):
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
    if missing := [name for name, (_, needed) in hints.items() if needed and name not in data]:
        raise ValueError(f"{kind.__name__} has no {missing[0]}")
    return kind(**{name: _typed(hints[name][0], value, f"{kind.__name__}.{name}") for name, value in data.items()})


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, tuple[Any, bool]]:
    """Field -> its type, and whether it is required."""
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    }


def _typed(hint: Any, value: Any, name: str) -> Any:
    """The value in its annotated type; lists become tuples. Unknown kinds of annotations are not checked."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if _fits(option, value):
            return _converted(option, value, name)
    raise ValueError(f"{name} is {_shown(value)}, not {' or '.join(getattr(o, '__name__', str(o)) for o in options)}")


def _fits(hint: Any, value: Any) -> bool:
    if hint is bool or hint is int:
        return type(value) is hint
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)
    if hint is str:
        return isinstance(value, str)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in {item.value for item in hint} if isinstance(value, str | int) else False
    return get_origin(hint) is not tuple or isinstance(value, list | tuple)


def _converted(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        every = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(every) != len(value):
            raise ValueError(f"{name} has {len(value)} entries, not {len(every)}")
        return tuple(
            _typed(kind, item, f"{name}[{k}]") for k, (kind, item) in enumerate(zip(every, value, strict=True))
        )
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if not isinstance(value, list | dict) else f"a {type(value).__name__}"
