"""Progress of a job with known stages: one bar a stage on stderr, or one line a stage where it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prunella.measure.clock import now, since

T = TypeVar("T")
Tick = Callable[..., None]
"""Call it once a step is done; whatever it is given is ignored, so that it fits any callback."""


class Stages:
    """Runs named stages, shows them, and remembers their seconds."""

    def __init__(self, *, show: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True, quiet=not show)
        self._live = show and sys.stderr.isatty()

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Tick]:
        """One stage of `steps` steps."""
        start = now()
        columns = TextColumn("{task.description:<34}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console, disable=not self._live) as progress:
            task = progress.add_task(name, total=steps)

            def tick(*_: object) -> None:
                progress.advance(task)

            yield tick
            progress.update(task, completed=steps)
        self.seconds[name] = since(start)
        if not self._live:
            self._console.print(f"{name:<34} {self.seconds[name]:6.1f} s", highlight=False)


def counted(items: Iterable[T], tick: Tick) -> Iterator[T]:
    """The items, with a tick after each."""
    for item in items:
        yield item
        tick()
