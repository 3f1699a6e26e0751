"""Every table of results in README and docs has a record: command, date, machine and seeds."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = "| method | top-1 |\n|---|---:|\n| new | 91.3 |\n"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("evidence")


def test_every_table_of_results_has_a_record_and_every_record_its_tables(evidence: ModuleType) -> None:
    assert evidence.faults(evidence.read()) == []


def test_a_table_without_a_record_is_seen(evidence: ModuleType) -> None:
    places = list(evidence.result_tables("new.md", f"# New\n\n## Found\n\n{TABLE}\n```text\n{TABLE}```\n"))
    assert places == ["new.md#found"]
    assert evidence.table_faults([], {"new.md#found": 1}) == ["new.md#found: 1 tables of results, and records of 0"]


def test_a_table_of_words_or_options_is_none_of_results(evidence: ModuleType) -> None:
    words = "| option | is |\n|---|---|\n| `a` | one |\n| `b` | 3 or more |\n| c | d |\n| e | f |\n"
    assert list(evidence.result_tables("x.md", words)) == []


def test_a_second_table_in_a_section_needs_a_record_too(evidence: ModuleType) -> None:
    record = replace(evidence.read()[0], tables={"new.md#found": 1})
    assert evidence.table_faults([record], {"new.md#found": 2}) == [
        "new.md#found: 2 tables of results, and records of 1"
    ]
    assert evidence.table_faults([replace(record, tables={"new.md": 2})], {"new.md#a": 1, "new.md#b": 1}) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"command": "python benchmarks/gone.py"}, "benchmarks/gone.py is not there"),
        ({"results": ("benchmarks/results/gone.json",)}, "benchmarks/results/gone.json is not there"),
        ({"date": "last week"}, "'last week' is no date"),
        ({"seeds": ""}, "no seeds"),
        ({"tables": {"README.md": 1}}, "not on its page"),
    ],
)
def test_a_record_that_names_nothing_is_seen(evidence: ModuleType, change: dict[str, object], fault: str) -> None:
    record = next(one for one in evidence.read() if one.name == "criteria")
    assert any(fault in line for line in evidence._record_faults(replace(record, **change)))


def test_the_page_names_every_record(evidence: ModuleType) -> None:
    text = evidence.page_text(evidence.read())
    for record in evidence.read():
        assert f"`{record.command}`" in text and record.date in text and record.machine in text


SOURCES = ("benchmarks", "sparse_inference", "llm", "llm_structured", "zoo", "large")
DECIMAL = re.compile(r"(?<![\w.:/])\d*\.\d+")


def prose(text: str) -> str:
    """A page without code, links and tables, which have records of their own."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    plain = "\n".join(line for line in lines if not line.startswith("|"))
    return re.sub(r"`[^`]*`|\]\([^)]*\)|Python 3\.\d+", "", plain)


def untold(text: str, known: list[float]) -> list[str]:
    """Decimal numbers that are neither known numbers nor known numbers rounded."""
    margins = [(number, 0.51 * 10.0 ** -len(number.partition(".")[2])) for number in DECIMAL.findall(text)]
    return [number for number, margin in margins if not any(abs(value - float(number)) <= margin for value in known)]


@pytest.mark.parametrize("page", ["../README.md", "index.md", "how-to-choose.md", "recovery.md", "peers.md"])
def test_numbers_of_the_text_stand_on_a_page_with_records(page: str) -> None:
    sources = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in SOURCES)
    known = [float(number) for number in DECIMAL.findall(sources)]
    assert untold(prose((DOCS / page).read_text(encoding="utf-8")), known) == []


def test_a_number_of_the_text_without_a_record_is_seen() -> None:
    assert untold(prose("| 9.99 |\nIt has 82.9 and `1.5` and 77.77 %."), [82.90, 77.7]) == ["77.77"]
