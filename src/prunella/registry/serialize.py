"""Methods as plain data and back: the recipe that a plan file stores. Nothing is imported by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

from prunella.errors import BadInput, RequestError
from prunella.registry.controlled import Controlled, name_of, plain_function
from prunella.registry.method import REGISTRY, Method, MethodKind, find

Described = dict[str, Any]
_KNOBS_OF_0_1 = {"normalise": "normalize"}


def describe(function: Any) -> Described:
    """A criterion, allocation or granularity as `{"name", "knobs"}`, with the value of every knob.

    A function that is not registered is written as `module:name`, for the record. Such an entry cannot be read back.
    For a criterion under a control, `"of"` describes the criterion.
    """
    if isinstance(function, Controlled):
        return {**describe(function.control), "of": describe(function.of)}
    bare = plain_function(function) if callable(function) else type(function)
    method = next((m for m in REGISTRY.values() if m.function is bare), None)
    name = method.name if method else f"{bare.__module__}:{name_of(bare)}"
    return {"name": name, "knobs": {key: _plain(value) for key, value in _knobs(function).items()}}


def described(value: Any) -> Any:
    """A recipe as plain data, functions by their names and knobs."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{f.name: described(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if callable(value):
        bound = value.keywords if isinstance(value, partial) else {}
        return {"name": describe(value)["name"], "knobs": {**describe(value)["knobs"], **described(bound)}}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def read(described: Mapping[str, Any], kind: MethodKind) -> Any:
    """The method that `describe` wrote, here or in 0.1. Errors: RequestError if unknown, BadInput if broken."""
    try:
        name, knobs = str(described["name"]), dict(described["knobs"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{described!r} does not describe a {kind}", f"{type(error).__name__}: {error}") from error
    if ":" in name:
        raise RequestError(f"the {kind} {name} is not part of prunella", "functions are not loaded by name from a file")
    if "of" in described:
        controlled = find(name, "control").function(read(described["of"], kind))
        if not isinstance(controlled, Controlled):
            raise BadInput(f"{name} is not a control")
        return controlled
    method = find(name, kind)
    current = {_KNOBS_OF_0_1.get(str(key), str(key)): value for key, value in knobs.items()}
    values = {key: _typed(method, key, value) for key, value in current.items()}
    if kind == "granularity":
        return method.function(**values)
    changed = {knob.name: values[knob.name] for knob in method.knobs if values.get(knob.name) != knob.default}
    return partial(method.function, **changed) if changed else method.function


def title(described: Mapping[str, Any]) -> str:
    """The name in what `describe` wrote; a control is followed by its criterion in brackets."""
    return f"{described['name']}({title(described['of'])})" if "of" in described else str(described["name"])


def _knobs(function: Any) -> dict[str, Any]:
    if not callable(function):
        return {entry.name: getattr(function, entry.name) for entry in fields(function)}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _typed(method: Method, knob: str, value: Any) -> Any:
    default = next((p.default for p in inspect.signature(method.function).parameters.values() if p.name == knob), None)
    return type(default)(value) if isinstance(default, Enum) else value
