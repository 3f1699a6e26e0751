"""The table of the 85 concepts: number, name, function, oracle test, section; and the check that nothing is made up.

    python docs/concept_table.py            # the table as Markdown
    python docs/concept_table.py --check    # exit 1 if a row is missing, or names what does not exist
    python docs/concept_table.py --package  # write the table that `prunella explain` reads, glossary included

One file of rows for each part of the subject lies in `docs/concepts/`, beside the pages with a section for each.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
COUNT = 85
PACKAGED = ROOT / "src" / "prunella" / "registry" / "concepts.toml"
PARTS = ("Measured", "Avoid", "Source", "Also called")
"""The list at the end of each section."""


@dataclass(frozen=True)
class Concept:
    """One row. `functions` are dotted paths, `tests` are `file.py::function`, `page` is a section below docs/."""

    number: int
    name: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]
    page: str


def read() -> list[Concept]:
    """All rows by number."""
    files = sorted((ROOT / "docs" / "concepts").glob("*.toml"))
    entries = [entry for file in files for entry in tomllib.loads(file.read_text(encoding="utf-8"))["concept"]]
    rows = [Concept(e["number"], e["name"], tuple(e["functions"]), tuple(e["tests"]), e["page"]) for e in entries]
    return sorted(rows, key=lambda row: row.number)


def faults(rows: list[Concept]) -> list[str]:
    """What is missing or wrong, one line each."""
    numbers = [row.number for row in rows]
    found = [f"concept {n} has no row" for n in range(1, COUNT + 1) if n not in numbers]
    found += [f"concept {n} has {numbers.count(n)} rows" for n in sorted(set(numbers)) if numbers.count(n) > 1]
    for row in rows:
        found += [f"concept {row.number} has no {what}" for what, some in (("function", row.functions),
                  ("test", row.tests)) if not some]  # fmt: skip
        found += [f"concept {row.number}: no function {name}" for name in row.functions if not _exists(name)]
        found += [f"concept {row.number}: no test {test}" for test in row.tests if not _tested(test)]
        found += [f"concept {row.number}: {fault}" for fault in _section_faults(row)]
    return found


def anchor(heading: str) -> str:
    """The anchor that the site gives to a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def section(row: Concept) -> str:
    """The text below the heading of a concept, empty if its page has no such heading."""
    file = ROOT / "docs" / row.page.partition("#")[0]
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.partition(f"\n## {row.name}\n")[2].partition("\n## ")[0]


def part(row: Concept, name: str) -> str:
    """One entry of the list at the end of a section, on one line."""
    found = re.search(rf"^- \*\*{name}:\*\* (.+?)(?=^- |^#|\Z)", section(row), re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _section_faults(row: Concept) -> list[str]:
    text = section(row)
    if not text or row.page.partition("#")[2] != anchor(row.name):
        return [f"no section {row.page}"]
    missing = [f"no {name} in its section" for name in PARTS if not part(row, name)]
    missing += [] if re.search(r"^Formula: \S", text, re.MULTILINE) else ["no formula in its section"]
    return missing + ([] if "\n```python\n" in text else ["no lines that run in its section"])


def table(rows: list[Concept]) -> str:
    """The rows as Markdown."""
    lines = ["| number | concept | in | proven by |", "| --- | --- | --- | --- |"]
    for row in rows:
        functions = ", ".join(f"`{name.removeprefix('prunella.')}`" for name in row.functions)
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
        lines.append(f"| {row.number} | [{row.name}]({row.page}) | {functions} | {tests} |")
    return "\n".join(lines)


def packaged(rows: list[Concept]) -> str:
    """The concepts and the glossary as TOML, with the names to type."""
    entries = [(row.name, _words(row), [_typed(name) for name in row.functions], row.page) for row in rows]
    entries += [(word, also, python, "glossary.md") for word, also, python in _glossary()]
    keys = ("name", "words", "python", "page")
    blocks = ["\n".join(["[[concept]]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}"
              for key, value in zip(keys, entry, strict=True))]) for entry in entries]  # fmt: skip
    return "# Written by docs/concept_table.py --package from docs/concepts and docs/glossary.md.\n\n" + (
        "\n\n".join(blocks) + "\n"
    )


def _words(row: Concept) -> list[str]:
    """What others call it. A comma inside brackets parts nothing."""
    return re.split(r", (?![^(]*\))", part(row, "Also called"))


def _glossary() -> list[tuple[str, list[str], list[str]]]:
    """Word, what others call it, and the names in Python."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return [(word, re.split(r"[,;] ", also), re.findall(r"`([^`]+)`", python)) for word, _, python, also in cells[2:]]


def _typed(path: str) -> str:
    """The shortest public name of what a dotted path leads to; the path itself if it is not public."""
    import prunella as pr

    owner, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(owner), name, None) if _is_module(owner) else None
    spaces = {space: getattr(pr, space) for space in pr.__all__}
    homes = {"pr": pr} | {f"pr.{space}": home for space, home in spaces.items() if isinstance(home, ModuleType)}
    public = [
        f"{home}.{name}" for home, module in homes.items() if name in dir(module) and getattr(module, name) is value
    ]
    return public[0] if value is not None and public else path


def _is_module(path: str) -> bool:
    try:
        importlib.import_module(path)
    except ModuleNotFoundError:
        return False
    return True


def _exists(path: str) -> bool:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            thing = getattr(thing, name, None)
        return thing is not None
    return False


def _tested(test: str) -> bool:
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file():
        return False
    nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return any(isinstance(node, ast.FunctionDef) and node.name == name.split("::")[-1] for node in nodes)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    if "--package" in sys.argv:
        PACKAGED.write_text(packaged(read()), encoding="utf-8")
        sys.exit(0)
    wrong = faults(read())
    print("\n".join(wrong) if "--check" in sys.argv else table(read()))
    sys.exit(1 if wrong and "--check" in sys.argv else 0)
