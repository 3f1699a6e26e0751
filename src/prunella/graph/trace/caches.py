"""Functions that hide sizes: `functools.lru_cache` gives that of one tensor to another, `torch.jit.script` none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch.jit import ScriptFunction

from prunella.graph.trace.tracked_int import Tracked

_CACHED = type(functools.lru_cache(len))
_LEFT = frozenset({"torch", "numpy", "scipy", "prunella"})
"""Packages whose cached functions see no size of a model."""


@contextmanager
def uncached() -> Iterator[None]:
    """Inside, cached functions of modules compute anew what depends on a tracked size, and do not keep it.

    Scripted functions run as the Python source that they were compiled from.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and _belongs_to_a_model(module.__name__):
            space = vars(module)
            replaced += [(space, name, value) for name, value in list(space.items()) if _hides(value)]
    for space, name, function in replaced:
        space[name] = _around(function) if type(function) is _CACHED else _as_python(function)
    try:
        yield
    finally:
        for space, name, function in replaced:
            space[name] = function


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
    """Whether a function that is scripted outside a recorded run runs: other runs do not see the calls inside."""
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
