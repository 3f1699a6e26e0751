"""The clock of the library: all durations are read here, so that tests can replace the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]
"""Seconds since a fixed point."""

_clock: Clock = time.perf_counter


def now() -> float:
    """Seconds of wall time since a fixed point; it never runs backwards."""
    return _clock()


def since(start: float) -> float:
    """Seconds since `start`, a value of `now`."""
    return now() - start


def thread_time() -> float:
    """Processor time of this thread in seconds: other programs do not count."""
    return time.thread_time()


def timestamp() -> float:
    """Seconds since 1970, for dates; never used for durations."""
    return time.time()


@contextmanager
def fake_clock(clock: Clock) -> Iterator[None]:
    """Use `clock` instead of the machine's clock in the body, for tests of time-dependent behavior."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
