"""Files that are sound but of another run, of another time, cut short, or without their last records.

    LD_PRELOAD=shim.so python -m tests.faults.exchanged [--verbs run,llm] [--most 6] [--seed 0]

Two runs that differ in all that they read are killed at the same places. Then files of the one are put in place of the
other's, one at a time and a whole folder at a time; journals of earlier states in place of later ones; journals lose
their end. What is answered is a refusal that says what differs, or the result that would have come anyway. A result of
one file, such as a plan, is what it says: there is nothing beside it that could tell that it was another one.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.faults.damage import answered
from tests.faults.processes import prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import State, states
from tests.faults.verbs import JOB, Verb

OTHER = JOB.replace("SEED = 0", "SEED = 5").replace("manual_seed(1)", "manual_seed(6)")
STATEMENTS = (
    "DELETE FROM records WHERE number = (SELECT max(number) FROM records)",
    "DELETE FROM records",
    "UPDATE head SET records = records - 1",
    "DELETE FROM head",
    "DELETE FROM identities",
)
CODES = (2, 3)
"""Another run, or a file that is not what it was."""


def files_of(home: Path) -> list[str]:
    """What a run has written, without locks."""
    files = (file.relative_to(home) for file in sorted(home.rglob("*")) if file.is_file())
    return [str(file) for file in files if file.parts[0] != "source" and not file.name.endswith(".lock")]


def exchanged(verb: Verb, home: Path, state: State, other: State) -> Cases:
    """Every file of the other run in the place of this one's, alone; journals with what belongs to them."""
    for name in files_of(state.home):
        theirs, mine = other.home / name, state.home / name
        if not theirs.is_file() or theirs.read_bytes() == mine.read_bytes():
            continue
        restore(state.home, home)
        for suffix in ("", "-wal", "-shm") if name.endswith(".sqlite") else ("",):
            (home / f"{name}{suffix}").unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(other.home / f"{name}{suffix}", home / f"{name}{suffix}")
        what = f"{state.name}, {name} of another run"
        if state.name == "finished" and verb.check and len(files_of(state.home)) == 1:
            yield what, partial(is_theirs, verb, home, other)
        else:
            yield what, partial(answered, verb, home, state, CODES, others=True)


def is_theirs(verb: Verb, home: Path, other: State) -> str:
    """What is wrong where one file is the whole result: nothing beside it says whose it is, and it is the other's."""
    assert verb.check is not None
    here, there = (start(verb.check, place).wait() for place in (home, other.home))
    same = (here.code, here.said) == (there.code, there.said) and here.code == 0
    return "" if same else f"exit code {here.code}, and not what is said of the other one: {here.said[-600:]}"


def older(verb: Verb, home: Path, before: State, state: State) -> Cases:
    """The journals of an earlier state in a later one, with and without what SQLite has beside them."""
    for name in (name for name in files_of(state.home) if name.endswith(".sqlite")):
        if not (before.home / name).is_file():
            continue
        for beside in (True, False):
            restore(state.home, home)
            shutil.copyfile(before.home / name, home / name)
            for suffix in ("-wal", "-shm"):
                if beside:
                    (home / f"{name}{suffix}").unlink(missing_ok=True)
            what = f"{state.name}, {name} as it was when {before.name}{'' if beside else ', beside the later log'}"
            yield what, partial(answered, verb, home, state, CODES)


def shorter(verb: Verb, home: Path, state: State, rng: random.Random, most: int) -> Cases:
    """Every file cut short at random places, and journals without their last records."""
    for name in files_of(state.home):
        size = (state.home / name).stat().st_size
        for length in sorted({rng.randrange(size) for _ in range(most)} | {0, size - 1}) if size else ():
            restore(state.home, home)
            with (home / name).open("r+b") as file:
                file.truncate(length)
            yield f"{state.name}, {name} cut to {length} bytes", partial(answered, verb, home, state, CODES)
    for name in (name for name in files_of(state.home) if name.endswith(".sqlite")):
        for statement in STATEMENTS:
            restore(state.home, home)
            with suppress(sqlite3.Error), closing(sqlite3.connect(home / name)) as database:
                with database:
                    changed = database.execute(statement).rowcount
                if changed:
                    yield f"{state.name}, {name}: {statement}", partial(answered, verb, home, state, CODES)


def pairs(verb: Verb, home: Path, most: int) -> Iterator[tuple[State, State]]:
    """The states of a run and those of another one, killed at the same places."""
    other = replace(verb, prepare=_prepared_by(verb, OTHER))
    elsewhere = home.parent / "other" / "home"
    elsewhere.parent.mkdir()
    twins = list(states(other, elsewhere, prepared(other, elsewhere), most))
    for state in list(states(verb, home, prepared(verb, home), most)):
        twin = next((other for other in twins if other.name == state.name), None)
        if twin is not None:
            yield state, twin


def _prepared_by(verb: Verb, job: str):  # type: ignore[no-untyped-def]
    def prepare() -> None:
        Path("source/job.py").write_text(job)
        verb.prepare()

    return prepare


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each exchange, and what was wrong."""
    rng, before = random.Random(f"{verb.name} {effort.seed}"), list[State]()
    for state, other in pairs(verb, home, max(2, effort.most // 2)):
        yield from exchanged(verb, home, state, other)
        for earlier in before[-2:]:
            yield from older(verb, home, earlier, state)
        yield from shorter(verb, home, state, rng, effort.most)
        if state.name != "finished":
            before.append(state)


ROUND = Round("exchanged", round_of, most=6)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
