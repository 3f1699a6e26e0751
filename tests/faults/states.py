"""Folders of runs that are not finished: what a verb has left when it was killed at some of its renames."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.contents import contents
from tests.faults.grid import Fault, call
from tests.faults.processes import restore
from tests.faults.verbs import Verb


@dataclass(frozen=True)
class State:
    """A home as a process has left it. expected: what the same call makes of it if nobody changes anything."""

    name: str
    home: Path
    expected: dict[str, str]


def states(verb: Verb, home: Path, kept: Path, most: int) -> Iterator[State]:
    """The finished state, and those after kills at `most` renames and fsyncs, spread over the run. Needs the shim."""
    code, counts, said = call(verb, home, None)
    if code:
        raise RuntimeError(f"{verb.name} ends with {code}: {said[-600:]}")
    expected, seen = contents(home), list[dict[str, str]]()
    yield State("finished", _moved(home, "finished"), expected)
    for kind, count in zip(("fsync", "rename"), counts[1:3], strict=True):
        for at in dict.fromkeys(1 + k * (count - 1) // max(1, most - 1) for k in range(most) if count):
            restore(kept, home)
            code, _, _ = call(verb, home, Fault(kind, at, "kill"))
            left = contents(home)
            if code == -signal.SIGKILL and left not in seen:
                seen.append(left)
                name = f"killed at {kind} {at}"
                yield State(name, _moved(home, name), expected)


def _moved(home: Path, name: str) -> Path:
    place = home.parent / "states" / name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    shutil.copytree(home, place, symlinks=True)
    return place
