"""Functions that hide sizes: `functools.lru_cache` returns sizes of earlier tensors, `torch.jit.script` shows none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from torch.jit import ScriptFunction

from prunella.graph.trace.tracked_int import Tracked
from prunella.model.beside import beside
from prunella.model.unread import is_elsewhere

_CACHED = type(functools.lru_cache(len))
_KINDS = frozenset({_CACHED, ScriptFunction, staticmethod, classmethod})
_LEFT = frozenset({"torch", "numpy", "scipy", "prunella"})
"""Packages with cached functions that never receive a size of a model."""


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, cached functions recompute results that depend on a tracked size, and do not cache them.

    This covers cached functions of source files, classes and modules, and static and class methods. Scripted functions
    run as the Python source from which they were compiled. A nested call searches only the files that are new.
    """
    global _searched
    before, renewed = _searched, dict[int, Any]()
    replaced = [(holder, name, value) for holder in _holders(model) for name, value in _hidden_in(holder)]
    for holder, name, value in replaced:  # many files name the same functions
        if id(value) not in renewed:
            renewed[id(value)] = _renewed(value)
        _set(holder, name, renewed[id(value)])
    _searched = before | sys.modules.keys()
    try:
        yield
    finally:
        _searched = before
        for holder, name, value in replaced:
            _set(holder, name, value)


def _holders(model: nn.Module) -> Iterator[Any]:
    for name, file in sys.modules.copy().items():  # in one step: a finalizer may import
        if name not in _searched and isinstance(file, ModuleType) and _belongs_to_a_model(file.__name__):
            yield file
    for file in (holder for holder in beside(model) if isinstance(holder, ModuleType)):
        yield from (v for v in vars(file).copy().values() if isinstance(v, type) and v.__module__ == file.__name__)
    for module in model.modules():
        yield module
        if not type(module).__module__.startswith("torch."):
            yield from (value for value in vars(module).values() if _is_own_object(value))


_searched: frozenset[str] = frozenset()
"""The names of the files whose functions are replaced now."""


def _is_own_object(value: object) -> bool:
    return (
        not is_elsewhere(value)
        and hasattr(value, "__dict__")
        and not isinstance(value, type | ModuleType | nn.Module)
        and not callable(value)
    )


def _hidden_in(holder: Any) -> list[tuple[str, Any]]:
    # This looks at every name of every imported file, most of which have none.
    if _KINDS.isdisjoint(map(type, vars(holder).copy().values())):
        return []
    return [(name, v) for name, v in vars(holder).copy().items() if type(v) in _KINDS and _hides(_bare(v))]


def _bare(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _renewed(value: Any) -> Any:
    function = _bare(value)
    around = _around(function) if type(function) is _CACHED else _as_python(function)
    return type(value)(around) if isinstance(value, staticmethod | classmethod) else around


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, type):
        setattr(holder, name, value)
    else:
        vars(holder)[name] = value


def _belongs_to_a_model(name: str) -> bool:
    package = name.partition(".")[0]
    return package not in _LEFT and (package not in sys.stdlib_module_names or package == "__main__")


def _hides(value: Any) -> bool:
    return type(value) is _CACHED or (type(value) is ScriptFunction and callable(_source(value)))


def _source(function: Any) -> Any:
    """The Python function that a scripted one was compiled from, where torch keeps it."""
    return getattr(function, "_torchdynamo_inline", None)


def _as_python(function: Any) -> Callable[..., Any]:
    source = _source(function)

    @functools.wraps(source)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _scripts
        _scripts += 1
        try:
            return source(*args, **kwargs)
        finally:
            _scripts -= 1

    return call


def in_script() -> bool:
    """Whether a function is running that is scripted outside a recorded run: other runs do not see its calls."""
    return _scripts > 0


_scripts = 0


def _around(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function.__wrapped__ if _has_size([args, kwargs]) else function)(*args, **kwargs)

    return call


def _has_size(value: Any) -> bool:
    if isinstance(value, dict):
        return _has_size(list(value.values()))
    return isinstance(value, Tracked) or (isinstance(value, tuple | list) and any(map(_has_size, value)))
