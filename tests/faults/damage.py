"""One bit flipped anywhere in what a run has left: refused at once, or of no consequence.

    LD_PRELOAD=shim.so python -m tests.faults.damage [--verbs run,llm] [--most 30] [--seed 0]

The folders are finished ones and those of runs that were killed. `most` places are tried in the header of every file
and in the rest of it, and in every record of a journal.
"""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.aftermath import besides_others, different
from tests.faults.contents import bytes_of, contents
from tests.faults.processes import prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import State, states
from tests.faults.verbs import Verb

REFUSED, MISUSE = 3, 2
SECONDS = 2.0
"""Of the processor, until a file is refused."""
KILLED = 4
"""Renames and fsyncs at which runs are killed, of each."""


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    file: str
    place: int
    bit: int

    def __str__(self) -> str:
        return f"{self.file}, byte {self.place}, bit {self.bit}"


def flips(home: Path, most: int, rng: random.Random) -> Iterator[Flip]:
    """Flips in every file but the source's: `most` in each of its parts."""
    for file in sorted(file for file in home.rglob("*") if file.is_file()):
        name = str(file.relative_to(home))
        if file.stat().st_size and name.partition("/")[0] != "source":
            for part in parts(file):
                places = part if len(part) <= most else rng.sample(part, most)
                yield from (Flip(name, place, rng.randrange(8)) for place in places)


def parts(file: Path) -> list[range]:
    """The bytes of a file's header, of its body, and of each record of a journal."""
    data = file.read_bytes()
    header = min(len(data), 100)
    if file.suffix == ".safetensors" or file.name.endswith(".plan"):
        header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    found = [range(header), range(header, len(data))]
    if file.suffix == ".sqlite":
        for text in _records(file):
            start = data.find(text)
            found += [range(start, start + len(text))] if start >= 0 else []
    return [part for part in found if part]


def _records(file: Path) -> list[bytes]:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as database:
            rows = database.execute("SELECT payload FROM records UNION ALL SELECT parts FROM identities").fetchall()
    except sqlite3.Error:
        return []
    return [text.encode() for (text,) in rows]


def flipped(verb: Verb, home: Path, state: State, flip: Flip) -> str:
    """What is wrong with the answer to a flipped bit; empty if nothing is."""
    restore(state.home, home)
    file = home / flip.file
    data = bytearray(file.read_bytes())
    data[flip.place] ^= 1 << flip.bit
    file.write_bytes(data)
    told = flip.file.endswith((".lock", ".plan"))  # a lock of others; a file that no plan replaces, since it is none
    return answered(verb, home, state, (REFUSED, MISUSE) if told else (REFUSED,))


def answered(verb: Verb, home: Path, state: State, refused: tuple[int, ...], *, others: bool = False) -> str:
    """What is wrong with the answer to a changed home: it has to be refused soon, or make no difference.

    others: records of other runs may stay in a journal that takes those of several runs.
    """
    work, before = verb.check if state.name == "finished" and verb.check else verb.call, lasting(home)
    ended = start(work, home).wait()
    if ended.code in refused:
        return f"refused after {ended.cpu:.1f} s of the processor" if ended.cpu > SECONDS else ""
    if ended.code not in (0, *verb.again) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-800:]}"
    if work is verb.check:
        return "accepted"
    if ended.code == MISUSE and lasting(home) == before and is_told(verb, home, state.expected):
        return ""
    names = different(contents(home), state.expected)
    names = besides_others(names, state.expected) if others and verb.shares else names
    return f"accepted, and then these differ: {', '.join(names)}" if names else ""


def lasting(home: Path) -> dict[str, str]:
    """All bytes, but those of locks and of what SQLite has beside a journal while it reads it."""
    return {name: value for name, value in bytes_of(home).items() if not name.endswith((".lock", "-wal", "-shm"))}


def is_told(verb: Verb, home: Path, expected: dict[str, str]) -> bool:
    """Whether a result that a second call leaves as it is, since it exists, is complete, or is refused by its reader.

    What is damaged beside a complete result is kept.
    """
    both = [
        {name: value for name, value in one.items() if name.partition("/")[0] == "out"}
        for one in (contents(home), expected)
    ]
    return verb.check is not None and start(verb.check, home).wait().code == (0 if both[0] == both[1] else REFUSED)


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each flip, and what was wrong."""
    kept = prepared(verb, home)
    rng = random.Random(f"{verb.name} {effort.seed}")
    for state in states(verb, home, kept, KILLED):
        for flip in flips(state.home, effort.most, rng):
            yield f"{state.name}, {flip}", partial(flipped, verb, home, state, flip)


ROUND = Round("damage", round_of, most=30)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
