"""Every fault at every call of every verb, under the shim; a line for each that is not survived.

    LD_PRELOAD=shim.so python -m tests.faults.grid [--verbs save,run] [--stride 1]

Each call is a forked process, in which the shim is armed; the second call is not disturbed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.aftermath import lost, second_call
from tests.faults.contents import bytes_of, contents
from tests.faults.processes import prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.verbs import Verb

KINDS = ("write", "fsync", "rename", "unlink", "mkdir")
ACTIONS = {"kill": (0, 0), "EIO": (1, errno.EIO), "ENOSPC": (1, errno.ENOSPC), "half": (2, 0)}
NEVER = 1 << 40
CODES = {"EIO": (0, 2, 3), "ENOSPC": (0, 5)}
"""How a verb may end whose call was refused; 0 where the call did not matter, as in cleaning up."""


@dataclass(frozen=True)
class Fault:
    """The call of that number, of that kind, ends so."""

    kind: str
    at: int
    action: str

    def __str__(self) -> str:
        return f"{self.action} at {self.kind} {self.at}"


def shim() -> ctypes.CDLL:
    """The shim, which is loaded already."""
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library


def call(verb: Verb, home: Path, fault: Fault | None) -> tuple[int, list[int], str]:
    """Call the verb in a process of its own: its exit code, how often each kind was called, and what it said."""
    told = home.parent / "told"
    told.write_text("")
    library = shim()

    def arm() -> None:
        kind, at = (KINDS.index(fault.kind), fault.at) if fault else (0, NEVER)
        action, number = ACTIONS[fault.action] if fault else (0, 0)
        library.faults_arm(os.fsencode(home), kind, at, action, number)

    def tell() -> None:
        told.write_text(" ".join(str(library.faults_count(kind)) for kind in range(len(KINDS))))

    ended = start(verb.call, home, first=arm, last=tell).wait()
    return ended.code, [int(word) for word in told.read_text().split()], ended.said


def faults(counts: list[int], effort: Effort) -> Iterator[Fault]:
    """Every action at the calls of every kind that are tried."""
    for kind, count in zip(KINDS, counts, strict=True):
        places, most = list(range(1, count + 1)), effort.most
        if most and len(places) > most:
            places = [places[k * (len(places) - 1) // max(1, most - 1)] for k in range(most)]
        for at in dict.fromkeys(places):
            yield Fault(kind, at, "kill")
            if kind == "write":
                yield Fault(kind, at, "half")
            if kind in ("write", "fsync", "rename", "mkdir"):
                yield Fault(kind, at, "ENOSPC" if at % 2 else "EIO")


def tried(verb: Verb, home: Path, kept: Path, fault: Fault, expected: dict[str, str]) -> str:
    """What is wrong after a fault and a second call; empty if nothing is."""
    restore(kept, home)
    source, before = bytes_of(home / "source"), contents(home)
    code, _, said = call(verb, home, fault)
    if bytes_of(home / "source") != source:
        return "the source was changed"
    if code == 0 and fault.action in ("kill", "half"):
        return ""  # another way through: the call of that number was not reached
    if fault.action in CODES and code not in CODES[fault.action]:
        return f"exit code {code}: {said[-300:]}"
    return lost(before, contents(home), expected) or second_call(verb, home, expected)


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each fault, and what was wrong."""
    kept = prepared(verb, home)
    code, counts, said = call(verb, home, None)
    if code:
        yield "no fault at all", lambda: f"exit code {code}: {said[-1000:]}"
        return
    expected, all_faults = contents(home), list(faults(counts, effort))
    print(f"{verb.name}: {len(all_faults)} faults", file=sys.stderr, flush=True)
    for fault in all_faults:
        yield str(fault), partial(tried, verb, home, kept, fault, expected)


ROUND = Round("grid", round_of)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
