"""Where the numbers of README and docs come from: a page for the site, and a check that every table has a record.

python docs/evidence.py            # the page as Markdown
python docs/evidence.py --check    # exit 1 if a table has no record, or a record names what is not there
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from concept_table import ROOT, anchor

NO_RESULTS = frozenset({"files.md#files-and-formats"})
"""Sections whose table holds numbers that nobody measured."""
RESULTS_SHARE = 0.3
"""A table is one of results if so many of its cells begin with a number, the first column apart."""
_HEAD = (
    "Where the numbers of the README and of these pages come from. A check fails when a table of results has no record",
    "here, when a record names a script or a file that is not there, or when a number is not the one in that file.",
    "",
    "Processors were not recorded in the first weeks. Ratios were measured in interleaved rounds, so they hold on",
    "machines of that kind; seconds do not.",
)
_RULE = re.compile(r"^\|[\s:|-]+\|$")
_NUMBER = re.compile(r"^\**[-+]?(\d|\.\d)")


@dataclass(frozen=True)
class Record:
    """How some numbers were made. tables: `page` or `page#section` -> how many. rendered: rows as they came out."""

    name: str
    what: str
    tables: Mapping[str, int]
    command: str
    date: str
    machine: str
    seeds: str
    results: tuple[str, ...]
    rendered: str = ""
    note: str = ""


def read() -> list[Record]:
    entries = tomllib.loads((ROOT / "docs" / "evidence.toml").read_text(encoding="utf-8"))["record"]
    return [Record(**{**entry, "results": tuple(entry["results"])}) for entry in entries]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def result_tables(page: str, text: str) -> Iterator[str]:
    """`page#section` for every table of results in a text."""
    place, fenced, lines = page, False, text.splitlines()
    for number, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if heading := re.match(r"#+ (.+)", line):
            place = place if fenced else f"{page}#{anchor(heading[1])}"
        if not fenced and _RULE.match(line) and _holds_results(lines[number + 1 :]):
            yield place


def _holds_results(lines: list[str]) -> bool:
    cells: list[str] = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells += [cell.strip() for cell in line.strip("|").split("|")[1:]]
    filled = [cell for cell in cells if cell]
    return bool(filled) and sum(map(bool, map(_NUMBER.match, filled))) >= RESULTS_SHARE * len(filled)


def faults(records: list[Record]) -> list[str]:
    """Tables without a record, and records that name what is not there."""
    counted = Counter(table for page in pages() for table in result_tables(page.name, page.read_text(encoding="utf-8")))
    return table_faults(records, counted) + [fault for record in records for fault in _record_faults(record)]


def table_faults(records: list[Record], counted: Mapping[str, int]) -> list[str]:
    known = Counter[str]()
    for record in records:
        known.update(record.tables)
    whole = {place for place in known if "#" not in place}
    seen = Counter[str]()
    for place, number in counted.items():
        page = place.partition("#")[0]
        seen[page if page in whole else place] += number
    wrong = [place for place in sorted({*seen, *known}) if seen[place] != known[place] and place not in NO_RESULTS]
    return [f"{place}: {seen[place]} tables of results, and records of {known[place]}" for place in wrong]


def _record_faults(record: Record) -> list[str]:
    empty = [f"{record.name}: no {key}" for key in ("what", "command", "machine", "seeds") if not getattr(record, key)]
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", record.date):
        empty.append(f"{record.name}: {record.date!r} is no date")
    scripts = re.findall(r"[\w/]+\.py", record.command)
    lost = [path for path in (*scripts, *record.results, record.rendered) if path and not (ROOT / path).exists()]
    return empty + [f"{record.name}: {path} is not there" for path in lost] + _changed_rows(record)


def _changed_rows(record: Record) -> list[str]:
    """Rows of numbers in the rendered file that none of the record's pages has."""
    if not record.rendered or not (ROOT / record.rendered).exists():
        return []
    names = {place.partition("#")[0] for place in record.tables}
    texts = "\n".join(page.read_text(encoding="utf-8") for page in pages() if page.name in names)
    known = {_plain(line) for line in texts.splitlines()}
    rows = (ROOT / record.rendered).read_text(encoding="utf-8").splitlines()
    lost = [row for row in rows if row.startswith("|") and re.search(r"\d\.\d", row) and _plain(row) not in known]
    return [f"{record.name}: not on its page: {row[:60]}" for row in lost]


def _plain(row: str) -> str:
    return re.sub(r"\s+", "", row)


def page_text(records: list[Record]) -> str:
    """The page of the site."""
    lines = ["# Evidence", "", *_HEAD, ""]
    for record in records:
        places = ", ".join(
            f"[{place}]({place})" if not place.startswith("README") else place for place in record.tables
        )
        kept = ", ".join(f"`{path}`" for path in record.results) or "not kept"
        lines += [f"## {record.name[0].upper()}{record.name[1:]}", "", f"{record.what}.", ""]
        lines += [f"- **Where:** {places}", f"- **Command:** `{record.command}`", f"- **Date:** {record.date}"]
        lines += [f"- **Machine:** {record.machine}", f"- **Seeds:** {record.seeds}", f"- **Results:** {kept}"]
        lines += [f"- **Note:** {record.note}"] if record.note else []
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    wrong = faults(read())
    print("\n".join(wrong) if "--check" in sys.argv else page_text(read()))
    sys.exit(1 if wrong and "--check" in sys.argv else 0)
