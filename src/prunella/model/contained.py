"""Runs of a model with arguments that nobody asked for: they print nothing, touch no file and start no program.

An argument such as `save_to=` or `debug=True` may write files. Inside, this is an error of the run.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CHANGES = "mkdir rmdir remove unlink rename replace symlink link truncate".split()
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Inside, this thread changes no file and starts no program, and its prints go nowhere."""
    places: list[tuple[Any, str, Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], bool]]] = [
        (builtins, "open", _opens_to_write),
        (io, "open", _opens_to_write),
        (os, "open", _flags_to_write),
        (torch, "save", _always),
        (os, "system", _always),
        (subprocess.Popen, "_execute_child", _always),
        *((os, name, _always) for name in _CHANGES),
    ]
    owner, before = threading.get_ident(), [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, refuses in places:
        setattr(place, name, _guarded(getattr(place, name), refuses, owner))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _guarded(function: Callable[..., Any], refuses: Callable[..., bool], owner: int) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == owner and refuses(function, args, kwargs):
            raise PermissionError(f"{function.__name__}: a trial run of a model changes no file and starts no program")
        return function(*args, **kwargs)

    return guarded


def _always(*_: Any) -> bool:
    return True


def _opens_to_write(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
    return not isinstance(mode, str) or bool(set(mode) & set("wax+"))


def _flags_to_write(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool((args[1] if len(args) > 1 else kwargs.get("flags", 0)) & _WRITES)
