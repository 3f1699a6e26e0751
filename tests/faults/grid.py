"""Every fault at every call of every verb, under the shim; a line for each that is not survived.

    LD_PRELOAD=shim.so python -m tests.faults.grid [--verbs save,run] [--stride 1]

Each call is a forked process, in which the shim is armed; the second call is not disturbed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.aftermath import lost, second_call
from tests.faults.contents import bytes_of, contents
from tests.faults.injected import KINDS, Fault, call
from tests.faults.processes import prepared, restore
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import undisturbed
from tests.faults.verbs import Verb

CODES = {"EIO": (0, 2, 3), "ENOSPC": (0, 5)}
"""How a verb may end whose call was refused; 0 where the call did not matter, as in cleaning up."""


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
    alone = undisturbed(verb, home, kept)
    if alone.code:
        yield "no fault at all", lambda: f"exit code {alone.code}: {alone.said[-1000:]}"
        return
    expected, all_faults = alone.state.expected, list(faults(alone.counts, effort))
    print(f"{verb.name}: {len(all_faults)} faults", file=sys.stderr, flush=True)
    for fault in all_faults:
        yield str(fault), partial(tried, verb, home, kept, fault, expected)


ROUND = Round("grid", round_of)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
