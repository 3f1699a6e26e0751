"""One fault of the system in one call of a verb, by the shim, which is loaded before the process starts."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import start
from tests.faults.verbs import Verb

KINDS = ("write", "fsync", "rename", "unlink", "mkdir")
ACTIONS = {"kill": (0, 0), "EIO": (1, errno.EIO), "ENOSPC": (1, errno.ENOSPC), "half": (2, 0)}
NEVER = 1 << 40


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
