"""Journals whose records somebody has rewritten, with digests made right again: whatever they say, it is only data.

    LD_PRELOAD=shim.so python -m tests.faults.forged [--verbs run,llm] [--most 5] [--seed 0]

Nobody can tell such a record from an own one, so that its numbers are believed. But wrong types, missing fields, names
of other files and numbers out of range are refused, as in any other file, and are never an error of the program.
"""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from prunella.io.journal import _link
from tests.faults.damage import SECONDS
from tests.faults.processes import prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import State, states
from tests.faults.verbs import Verb
from tests.fuzz.mutate import json_changed

REFUSED = (1, 2, 3, 6)
"""What a reader of data may say: a target or a check is missed, another run, a broken file, not supported."""


def payloads(journal: Path) -> list[tuple[int, bytes]]:
    """Number and text of every record."""
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT number, payload FROM records ORDER BY number").fetchall()
    return [(number, text.encode()) for number, text in rows]


def forge(journal: Path, number: int, text: str) -> None:
    """Rewrite one record, and all digests that depend on it."""
    with closing(sqlite3.connect(journal)) as database, database:
        database.execute("UPDATE records SET payload = ? WHERE number = ?", (text, number))
        chain = ""
        for row, identity, key, payload in database.execute(
            "SELECT number, identity, key, payload FROM records ORDER BY number"
        ).fetchall():
            chain = _link(chain, identity, key, payload)
            database.execute("UPDATE records SET chain = ? WHERE number = ?", (chain, row))
        database.execute("UPDATE head SET chain = ?", (chain,))


def forgeries(home: Path, most: int, rng: random.Random) -> Iterator[tuple[str, int, str]]:
    """Journal, record and another text for it."""
    for file in sorted(home.rglob("*.sqlite")):
        for number, text in payloads(file):
            for _ in range(most):
                yield str(file.relative_to(home)), number, json_changed(text, rng).decode("utf-8", "replace")


def tried(verb: Verb, home: Path, state: State, name: str, number: int, text: str) -> str:
    """What is wrong with the answer to a forged record, if anything."""
    restore(state.home, home)
    forge(home / name, number, text)
    ended = start(verb.call, home).wait()
    if ended.code not in (0, *verb.again, *REFUSED) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-1200:]}"
    return f"refused after {ended.cpu:.1f} s" if ended.code in REFUSED and ended.cpu > SECONDS else ""


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each forgery, and what was wrong."""
    kept, rng = prepared(verb, home), random.Random(f"{verb.name} {effort.seed}")
    for state in states(verb, home, kept, 3):
        for name, number, text in forgeries(state.home, effort.most, rng):
            what = f"{state.name}, record {number} of {name} as {text[:200]}"
            yield what, partial(tried, verb, home, state, name, number, text)


ROUND = Round("forged", round_of, most=5)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
