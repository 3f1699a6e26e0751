"""The table of docs/reliability.md is long enough, and each of its rows names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| (?P<behavior>[^|]+) \| (?P<code>\d+) \| `(?P<test>[^`]+)` \|$", re.MULTILINE)
CODES = {"0", "1", "2", "3", "5", "6", "7", "9"}
"""Those of docs/errors.md, and 9 for a process that was killed."""


def rows() -> list[re.Match[str]]:
    return list(ROW.finditer((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))


def test_there_are_enough_faults_each_once_and_with_a_code() -> None:
    faults = [row["fault"] for row in rows()]
    assert len(faults) >= 42 and len(set(faults)) == len(faults)
    assert {row["code"] for row in rows()} <= CODES


def test_every_test_that_is_named_exists() -> None:
    for row in rows():
        path, _, name = row["test"].partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row["test"]
