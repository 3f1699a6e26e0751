"""Stages of `prune`: their work, their duration, their effect, and an estimate of the remaining time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunella.errors import RequestError
from prunella.measure.clock import now, since

log = logging.getLogger("prunella.prune")
_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Stage:
    """One stage. before, after: distance to the dense outputs on held-out batches; None if nothing is compared.

    note: the work done, and the work left out with the reason. measure: name and unit of the distance.
    """

    name: str
    seconds: float = 0.0
    before: float | None = None
    after: float | None = None
    note: str = ""
    measure: str = "distance"

    @property
    def told(self) -> str:
        """The stage without its name."""
        change = "" if self.after is None else f", {self.measure} {self.after:.4g}"
        if self.before is not None and self.after is not None:
            change = f", {self.measure} {self.before:.4g} -> {self.after:.4g}"
        return f"{self.seconds:.1f} s{change}{f' ({self.note})' if self.note else ''}"

    def plain(self) -> dict[str, Any]:
        """As plain data, for a journal."""
        return {"text" if name == "note" else name: value for name, value in asdict(self).items()}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Stage:
        """The stage from the output of `plain`."""
        return cls(**{"note" if name == "text" else name: value for name, value in plain.items()})

    def __str__(self) -> str:
        return f"{self.name}: {self.told}"


@dataclass(frozen=True)
class Progress:
    """Progress of a stage: `done` of `total` parts after `seconds`. left: estimated seconds for the rest of it."""

    stage: str
    done: int
    total: int
    seconds: float

    @property
    def left(self) -> float:
        """The estimate from the finished parts."""
        return self.seconds * (self.total - self.done) / self.done if self.done else float("nan")

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.total}, about {self.left:.0f} s left"


OnStage = Callable[[Progress], None]
"""Called after each part of a stage; at the end of a stage `done` is `total`."""
Tick = Callable[[int, int], None]
"""Reports the number of finished parts and the total."""


@dataclass
class StageTimer:
    """The stages so far, and the time left for the others. budget: in seconds, or None."""

    budget: float | None = None
    on_stage: OnStage | None = None
    history: list[Stage] = field(default_factory=list)
    start: float = field(default_factory=now)

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a budget."""
        return float("inf") if self.budget is None else max(0.0, self.budget - since(self.start))

    @contextmanager
    def stage(self, name: str) -> Iterator[Running]:
        """One stage; its entry joins the history at the end."""
        running = Running(self, name)
        yield running
        self.history.append(replace(running.entry, seconds=since(running.start)))
        log.info("%s", self.history[-1])
        running.tick(1, 1)

    def recorded(self, count: int) -> dict[str, Any]:
        """The stages after the first `count`, as plain data for a journal."""
        return {"stages": [stage.plain() for stage in self.history[count:]]}

    def go_on(self, stages: Iterable[Mapping[str, Any]]) -> None:
        """Add the stages of a killed call, from `recorded`, to the history; their time counts as spent."""
        for stage in map(Stage.read, stages):
            self.history.append(stage)
            self.start -= stage.seconds

    def skip(self, name: str, why: str) -> None:
        """Record a stage that is left out."""
        self.history.append(Stage(name, note=f"left out: {why}"))
        log.info("%s", self.history[-1])


@dataclass
class Running:
    """The stage that runs."""

    timer: StageTimer
    name: str
    start: float = field(default_factory=now)
    entry: Stage = field(init=False)

    def __post_init__(self) -> None:
        self.entry = Stage(self.name)

    def tick(self, done: int, total: int) -> None:
        """Report the progress of the stage."""
        progress = Progress(self.name, done, total, since(self.start))
        log.debug("%s", progress)
        if self.timer.on_stage:
            self.timer.on_stage(progress)

    def note(self, text: str) -> None:
        """Add a remark on work done or left out."""
        self.entry = replace(self.entry, note="; ".join(filter(None, [self.entry.note, text])))

    def compared(self, before: float | None, after: float | None, measure: str) -> None:
        """Record the distance before and after the stage."""
        self.entry = replace(self.entry, before=before, after=after, measure=measure)


def seconds_of(budget: float | str | None) -> float | None:
    """Read `"2min"`, `"90s"`, `"1h"` or seconds. Errors: RequestError."""
    if budget is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(budget))
    unit = match[2] or "s" if match else ""
    try:
        seconds = float(match[1]) * _UNITS[unit] if match else -1.0
    except (ValueError, KeyError):
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"cannot read budget={budget!r}", "a time above 0 is needed", 'for example "2min" or 90')
    return seconds
