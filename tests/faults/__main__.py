"""Rounds of faults by name, all of them if none is named: `LD_PRELOAD=shim.so python -m tests.faults [ROUND,...]`.

--verbs scan,run    --most 60    --stride 1    --seed 0

Several lines in one process, which starts once, have a + between them: `grid --verbs save + moments --verbs scan`.
"""

from __future__ import annotations

import sys

from tests.faults import damage, exchanged, forged, grid, moments, room, together, traces
from tests.faults.rounds import main

MODULES = (grid, moments, damage, exchanged, forged, together, room, traces)
ROUNDS = {module.ROUND.name: module.ROUND for module in MODULES}


def line(words: list[str]) -> int:
    """The exit code of one line."""
    named = words[:1] if words and not words[0].startswith("-") else []
    names = named[0].split(",") if named else list(ROUNDS)
    return main([ROUNDS[name] for name in names], __doc__, words[len(named) :])


def lines(words: list[str]) -> list[list[str]]:
    """The words between each + and the next."""
    if "+" not in words:
        return [words]
    at = words.index("+")
    return [words[:at], *lines(words[at + 1 :])]


if __name__ == "__main__":
    sys.exit(max([line(words) for words in lines(sys.argv[1:])]))
