"""The examples of README, CONTRIBUTING and the documentation run, and its command lines exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer

from prunella.cli.app import app
from prunella.registry.catalogue import load_all
from prunella.registry.method import REGISTRY
from prunella.stats import STATISTICS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: f"{page.relative_to(ROOT)}")
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program."""
    monkeypatch.chdir(tmp_path)
    load_all()
    known, statistics = dict(REGISTRY), dict(STATISTICS)
    program = "\n".join(blocks(page, "python"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, str(page), "exec"), {"__name__": page.stem})
    REGISTRY.clear()
    REGISTRY.update(known)  # CONTRIBUTING registers a criterion of its own
    STATISTICS.clear()
    STATISTICS.update(statistics)  # and docs/own_statistic.md a statistic
    assert printed.getvalue().strip() or "print(" not in program


def commands() -> list[tuple[str, str]]:
    lines = [(page.name, line) for page in PAGES for body in blocks(page, "console") for line in body.splitlines()]
    return [(name, line.removeprefix("$ ")) for name, line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("line", [line for _, line in commands() if line.startswith("prunella ")])
def test_command_lines_name_real_verbs_and_options(line: str) -> None:
    words = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    verb = group.commands[words[1]]  # type: ignore[attr-defined]
    options = {text for parameter in verb.params for text in parameter.opts}
    assert [word for word in words[2:] if word.startswith("-") and word not in options] == []


@pytest.mark.parametrize(
    "line", sorted({line.split("#")[0].strip() for _, line in commands() if line.startswith("make ")})
)
def test_make_targets_exist(line: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line.split()[1] in targets


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [verb for verb in verbs if f"`{verb}`" not in text] == []


def test_exit_codes_are_documented() -> None:
    from prunella import errors

    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PruningError)]
    for kind in kinds:
        if kind is not errors.PruningError:
            row = next(line for line in text.splitlines() if line.startswith(f"| {kind.exit_code} |"))
            assert f"`{kind.__name__}`" in row


def test_formats_of_files_are_documented() -> None:
    from prunella.app import record
    from prunella.io import journal, manifest, nested, plan_file

    rows = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| ")]
    formats = {name: form for name, _, form, *_ in (row for row in table if len(row) == 4)}
    assert formats["plan file"] == str(plan_file.VERSION)
    assert formats["artifact folder"] == formats["sparse artifact folder"] == str(manifest.FORMAT)
    assert formats["`run.json` of a run folder"] == str(record.FORMAT)
    assert formats["`journal.sqlite`"] == str(journal.FORMAT)
    assert formats["nested state, `NAME.safetensors`"] == str(nested.VERSION)
    text = "\n".join(rows)
    assert [name for name in journal.FORMER if f"`{name}`" not in text] == []
