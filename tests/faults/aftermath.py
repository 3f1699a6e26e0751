"""What has to hold after any fault: what was there before is whole, and the same call ends as if alone."""

from __future__ import annotations

from pathlib import Path

from tests.faults.contents import RECORD, contents
from tests.faults.processes import start
from tests.faults.verbs import Verb


def lost(before: dict[str, str], after: dict[str, str], expected: dict[str, str]) -> str:
    """A result that stood there before is whole, or the new one is."""
    mine = {name: value for name, value in before.items() if name.partition("/")[0] == "out"}
    now = {name: value for name, value in after.items() if name in mine}
    new = {name: expected.get(name) for name in mine}
    return "" if now in (mine, new) else "the old result is neither whole nor replaced"


def second_call(verb: Verb, home: Path, expected: dict[str, str]) -> str:
    """What is wrong with a call that nothing disturbs, and with what is there after it."""
    ended = start(verb.call, home).wait()
    if ended.code not in verb.again:
        return f"the second call ends with {ended.code}: {ended.said[-600:]}"
    names = different(contents(home), expected)
    return f"after the second call these differ: {', '.join(names)}" if names else ""


def different(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names whose contents differ, or that one of the two does not have."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def besides_others(names: list[str], expected: dict[str, str]) -> list[str]:
    """Those of the names that do not only say that a journal holds records of other runs too."""
    shared = {name.partition(RECORD)[0] for name in names if RECORD in name and name not in expected}
    return [name for name in names if name not in shared and (RECORD not in name or name in expected)]
