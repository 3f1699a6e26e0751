"""Evaluations that stop a run, and what a journal holds: for runs that have to go on where they were.

What stops is the state of this module and no part of the evaluation: the run that goes on is asked the same question.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from prunella.io.journal import NAME

_left: list[int] = []
_also: list[Callable[[], object]] = []


def at_every_tick(function: Callable[[], object]) -> None:
    """Call a function at every call of an evaluation."""
    _also.append(function)


def tick() -> None:
    """One call of an evaluation; KeyboardInterrupt in the one that `stops_at` names."""
    for function in _also:
        function()
    if _left:
        _left[0] -= 1
        if not _left[0]:
            raise KeyboardInterrupt


def killed(function: Callable[[], object]) -> int:
    """The exit code of a process that calls a function, and is killed there."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def stops_at(call: int) -> Iterator[None]:
    """The block is stopped at the call of that number, counted from 1."""
    _left[:] = [call]
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        _left.clear()


def records(folder: Path) -> int:
    """How many records the journal of a folder holds; 0 if there is none yet. Another process may be writing."""
    if not (folder / NAME).exists():
        return 0
    with closing(sqlite3.connect(f"file:{folder / NAME}?mode=ro", uri=True)) as database:
        count: int = database.execute("SELECT count(*) FROM records").fetchone()[0]
    return count


def beside(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises in another thread, as a second run would: the thread of the first holds the lock."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()
