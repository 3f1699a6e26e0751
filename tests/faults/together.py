"""Two runs in one place, started within milliseconds; and locks that somebody else has left.

    LD_PRELOAD=shim.so python -m tests.faults.together [--verbs run,llm] [--most 10] [--seed 0]

One of the two runs makes what it would have made alone. The other one is refused at once, or comes when all is done. A
lock of another machine is respected, and nothing changes; one whose process has ended is taken over, also where its
number belongs to another process by now.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from functools import partial
from pathlib import Path

from prunella.io.lock import Holder
from tests.faults.aftermath import different, second_call
from tests.faults.contents import bytes_of, contents
from tests.faults.processes import Ended, prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import State, states, undisturbed
from tests.faults.verbs import Verb

REFUSED = 2
_TEMPORARY = re.compile(r"\.(part|old)(/|$)")
WIDEST = 0.3
"""Most of the time of a run that the second one starts later."""


def two_at_once(verb: Verb, home: Path, delay: float) -> tuple[Ended, Ended]:
    """Two processes that are ready before they start, the second one a little later."""
    out, go = os.pipe()

    def ready() -> None:
        os.close(go)
        os.read(out, 1)

    first, second = (
        start(verb.call, home, first=ready),
        start(verb.call, home, first=lambda: (ready(), time.sleep(delay))),
    )
    os.close(out)
    time.sleep(0.05)
    os.close(go)
    return first.wait(), second.wait()


def race(verb: Verb, home: Path, delay: float, expected: dict[str, str]) -> str:
    """What is wrong with the end of two runs; empty if nothing is."""
    both = two_at_once(verb, home, delay)
    codes = sorted(ended.code for ended in both)
    said = "\n---\n".join(ended.said[-500:] for ended in both)
    if codes[0] != 0 or codes[1] not in (REFUSED, *verb.again) or "Traceback" in said:
        return f"exit codes {codes}: {said}"
    names = different(contents(home), expected)
    return f"these differ: {', '.join(names)}" if names else ""


def locks_of(home: Path) -> list[Path]:
    """The lock files that a killed run has left."""
    return sorted(file for file in home.rglob(".*.lock") if file.is_file())


def foreign(verb: Verb, home: Path, state: State, locks: list[str]) -> str:
    """What is wrong where locks that were left are those of another machine."""
    restore(state.home, home)
    for lock in locks:
        (home / lock).write_text(Holder(7, "elsewhere", 1.7e9).text())
    before = _lasting(home)
    ended = start(verb.call, home).wait()
    complete = REFUSED in verb.again and "it is not empty" in ended.said  # nothing is left to be locked
    if ended.code != REFUSED or not (complete or "process 7 on elsewhere" in ended.said):
        return f"exit code {ended.code}: {ended.said[-600:]}"
    changed = different(_lasting(home), before)
    return f"it changed {', '.join(changed)}" if changed else ""


def _lasting(home: Path) -> dict[str, str]:
    """All files but the temporary ones, which any process may take away whose own machine has left them."""
    return {name: value for name, value in bytes_of(home).items() if not _TEMPORARY.search(name)}


def reused(verb: Verb, home: Path, state: State, lock: str) -> str:
    """What is wrong where the number in the lock belongs to another process by now."""
    restore(state.home, home)
    _, host, started = (home / lock).read_text().splitlines()
    (home / lock).write_text(Holder(os.getpid(), host, float(started)).text())
    return second_call(verb, home, state.expected)


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each race and each lock, and what was wrong."""
    kept, rng = prepared(verb, home), random.Random(f"{verb.name} {effort.seed}")
    alone = undisturbed(verb, home, kept)
    for k in range(effort.most):
        delay = 0.0 if k % 3 == 0 else rng.random() ** 2 * (0.02 if k % 3 == 1 else WIDEST * alone.seconds)
        restore(kept, home)
        yield f"two runs, {1e3 * delay:.1f} ms apart", partial(race, verb, home, delay, alone.state.expected)
    for state in states(verb, home, kept, 3):
        locks = [str(file.relative_to(state.home)) for file in locks_of(state.home)]
        outer = locks[:1]  # who holds an inner one holds this one too
        for some in (outer, locks) if len(locks) > 1 else (outer,) if locks else ():
            yield f"{state.name}, {', '.join(some)} of another machine", partial(foreign, verb, home, state, some)
        for lock in locks:
            yield f"{state.name}, {lock} of a process whose number is in use", partial(reused, verb, home, state, lock)


ROUND = Round("together", round_of, most=10)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
