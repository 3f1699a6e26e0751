"""Signals at random moments of every verb, alone or one after the other; then the second call.

    LD_PRELOAD=shim.so python -m tests.faults.moments [--verbs run,llm] [--most 60] [--seed 0]

SIGKILL, SIGINT and SIGTERM reach the process anywhere: in Python, in torch, in SQLite, in a cleaning up. Whatever it
was doing, the same call ends afterwards with the bits of a run that nothing stopped, and with no file more.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.aftermath import lost, second_call
from tests.faults.contents import bytes_of, contents
from tests.faults.processes import Ended, prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import undisturbed
from tests.faults.verbs import Verb

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
KILLS = 5
"""One after the other, in the hardest of the cases."""
LEFT = re.compile(r"\.(part|old)(-\w+)?$|\.lock$")
"""Temporary files and locks, which a run that ends by itself takes away."""


@dataclass(frozen=True)
class Moment:
    """Signals after these parts of the time that the verb takes; the second of an impatient user comes at once."""

    number: signal.Signals
    parts: tuple[float, ...]
    twice: bool = False

    def __str__(self) -> str:
        times = ", ".join(f"{part:.3f}" for part in self.parts)
        return f"{self.number.name}{' twice' if self.twice else ''} at {times} of the time"


def moments(most: int, rng: random.Random) -> Iterator[Moment]:
    """`most` moments of every signal, spread over the time; every fifth is a series of kills."""
    for number in SIGNALS:
        for k in range(most):
            part = (k + rng.random()) / most
            if number is signal.SIGKILL and k % 5 == 4:
                yield Moment(number, tuple(rng.random() for _ in range(KILLS)))
            else:
                yield Moment(number, (part,), twice=number is not signal.SIGKILL and k % 4 == 3)


def interrupted(verb: Verb, home: Path, moment: Moment, part: float, seconds: float) -> Ended:
    """How the verb ends whose process gets the signal after a part of the time."""
    from prunella.cli import end_as_interrupted

    ready, began = os.pipe()
    process = start(verb.call, home, first=lambda: (end_as_interrupted(), os.close(began), os.close(ready)))
    os.close(began)
    os.read(ready, 1)  # until the process ends signals as the command line does, as soon as it can
    os.close(ready)
    time.sleep(part * seconds)
    for _ in range(1 + moment.twice):
        with suppress(ProcessLookupError):
            os.kill(process.pid, moment.number)
    return process.wait()


def wrong_end(verb: Verb, home: Path, moment: Moment, ended: Ended) -> str:
    """What is wrong with the end of an interrupted process, if anything."""
    if moment.number is signal.SIGKILL:
        return "" if ended.code in (-signal.SIGKILL, *verb.again) else f"exit code {ended.code}: {ended.said[-600:]}"
    if ended.code not in (7, *verb.again) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-1500:]}"
    left = [name for name in contents(home) if LEFT.search(name)]
    return f"it left {', '.join(left)}" if left and not moment.twice else ""


def tried(verb: Verb, home: Path, kept: Path, moment: Moment, seconds: float, expected: dict[str, str]) -> str:
    """What is wrong after the signals and a second call; empty if nothing is."""
    restore(kept, home)
    source, before = bytes_of(home / "source"), contents(home)
    for part in moment.parts:
        ended = interrupted(verb, home, moment, part, seconds)
        if bytes_of(home / "source") != source:
            return "the source was changed"
        if wrong := wrong_end(verb, home, moment, ended) or lost(before, contents(home), expected):
            return wrong
    return second_call(verb, home, expected)


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each moment, and what was wrong."""
    kept = prepared(verb, home)
    alone = undisturbed(verb, home, kept)
    if alone.code:
        yield "no signal at all", lambda: f"exit code {alone.code}: {alone.said[-600:]}"
        return
    for moment in moments(effort.most, random.Random(f"{verb.name} {effort.seed}")):
        yield str(moment), partial(tried, verb, home, kept, moment, alone.seconds, alone.state.expected)


ROUND = Round("moments", round_of, most=60)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
