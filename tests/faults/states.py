"""Folders of runs that are not finished: what a verb has left when it was killed at some of its renames.

Rounds share them: each run of a home is made once.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.contents import contents
from tests.faults.injected import Fault, call
from tests.faults.processes import restore
from tests.faults.verbs import Verb


@dataclass(frozen=True)
class State:
    """A home as a process has left it. expected: what the same call makes of it if nobody changes anything."""

    name: str
    home: Path
    expected: dict[str, str]


@dataclass(frozen=True)
class Undisturbed:
    """A call that nothing disturbs. counts: how often each kind was called, see `injected.KINDS`."""

    code: int
    said: str
    seconds: float
    counts: list[int]
    state: State


_UNDISTURBED = dict[Path, Undisturbed]()
_KILLED = dict[tuple[Path, Fault], State | None]()


def undisturbed(verb: Verb, home: Path, kept: Path) -> Undisturbed:
    """The verb as it is called alone. Needs the shim."""
    if home not in _UNDISTURBED:
        restore(kept, home)
        began = time.monotonic()
        code, counts, said = call(verb, home, None)
        seconds = time.monotonic() - began
        state = State("finished", _moved(home, "finished"), contents(home))
        _UNDISTURBED[home] = Undisturbed(code, said, seconds, counts, state)
    return _UNDISTURBED[home]


def states(verb: Verb, home: Path, kept: Path, most: int) -> Iterator[State]:
    """The finished state, and those after kills at `most` renames and fsyncs, spread over the run. Needs the shim."""
    alone = undisturbed(verb, home, kept)
    if alone.code:
        raise RuntimeError(f"{verb.name} ends with {alone.code}: {alone.said[-600:]}")
    yield alone.state
    seen = list[dict[str, str]]()
    for kind, count in zip(("fsync", "rename"), alone.counts[1:3], strict=True):
        for at in dict.fromkeys(1 + k * (count - 1) // max(1, most - 1) for k in range(most) if count):
            state = _killed(verb, home, kept, Fault(kind, at, "kill"))
            if state is not None and (left := contents(state.home)) not in seen:
                seen.append(left)
                yield state


def _killed(verb: Verb, home: Path, kept: Path, fault: Fault) -> State | None:
    """What is left of a verb that is killed there; None if it does not come there."""
    if (home, fault) not in _KILLED:
        expected = undisturbed(verb, home, kept).state.expected
        restore(kept, home)
        code, _, _ = call(verb, home, fault)
        name = f"killed at {fault.kind} {fault.at}"
        state = State(name, _moved(home, name), expected) if code == -signal.SIGKILL else None
        _KILLED[home, fault] = state
    return _KILLED[home, fault]


def _moved(home: Path, name: str) -> Path:
    place = home.parent / "states" / name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    shutil.copytree(home, place, symlinks=True)
    return place
