"""Stages of `prune`: what was done, how long it took, what it changed, and how long the rest will take."""

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
    """One stage. before, after: distance from the dense outputs on held-out batches; None where nothing is compared.

    note: what was done, and what was left out and why. measure: what the distance is, with its unit.
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
        """What `plain` gave."""
        return cls(**{"note" if name == "text" else name: value for name, value in plain.items()})

    def __str__(self) -> str:
        return f"{self.name}: {self.told}"


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` parts after `seconds`. left: seconds that the rest of it will take."""

    stage: str
    done: int
    total: int
    seconds: float

    @property
    def left(self) -> float:
        """An estimate from the parts that are done."""
        return self.seconds * (self.total - self.done) / self.done if self.done else float("nan")

    def __str__(self) -> str:
        return f"{self.stage}: {self.done} of {self.total}, about {self.left:.0f} s left"


OnStage = Callable[[Progress], None]
"""Called after each part of a stage; at the end of a stage `done` is `total`."""
Tick = Callable[[int, int], None]
"""Tells how many parts of how many are done."""


@dataclass
class StageTimer:
    """The stages so far, and the time that is left for the others. budget: in seconds, or None."""

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
        """Stages of a killed call, as `recorded` gave them: they join the history, and count as time spent."""
        for stage in map(Stage.read, stages):
            self.history.append(stage)
            self.start -= stage.seconds

    def skip(self, name: str, why: str) -> None:
        """A stage that is left out."""
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
        """Tell how far the stage is."""
        progress = Progress(self.name, done, total, since(self.start))
        log.debug("%s", progress)
        if self.timer.on_stage:
            self.timer.on_stage(progress)

    def note(self, text: str) -> None:
        """Say what was done or left out."""
        self.entry = replace(self.entry, note="; ".join(filter(None, [self.entry.note, text])))

    def compared(self, before: float | None, after: float | None, measure: str) -> None:
        """Say what the stage changed."""
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
