"""Examples in every help, methods in 80 columns, tables and plots for other programs, progress in a log."""

from __future__ import annotations

import csv
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from prunella.cli import console
from prunella.cli.app import app
from prunella.cli.examples import EXAMPLES
from tests.cli.conftest import MODULE, WORDS, Run

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
QUICK = ("methods", "explain", "inspect", "plan", "scan", "run")
MORE = """

def resnet():
    return net()


def accuracy(model):
    return -float(loss(model, loader()[0]).detach())
"""


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_help_has_examples_with_options_that_exist(prunella: Run, verb: str) -> None:
    lines = EXAMPLES[verb]
    text = prunella(verb, "--help").out
    options = {text for parameter in COMMANDS[verb].params for text in parameter.opts}
    for line in lines:
        assert f"  {line}\n" in text
        words = shlex.split(line.rpartition("|")[2])
        assert words[:2] == ["prunella", verb]
        assert [word for word in words[2:] if word.startswith("-") and word not in options] == []


@pytest.mark.parametrize(
    "line",
    [line for verb in QUICK for line in EXAMPLES[verb] if "torchvision" not in line],
)
def test_quick_examples_run(prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"net_{abs(hash(tmp_path.name))}"  # Python knows one module by a name
    Path(f"{name}.py").write_text(MODULE + MORE)
    words = shlex.split(line.replace("net.py", f"{name}.py"))[1:]
    shapes = () if words[0] in ("methods", "explain") else ("--inputs", "1x3x8x8")
    words = [word for word in words if word not in ("--inputs", "1x3x32x32")]
    done = prunella(*words, *shapes)
    assert done.code == 0 and done.out, done.err


def test_methods_say_what_they_do_in_80_columns(prunella: Run) -> None:
    text = prunella("methods").out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    criteria = prunella("methods", "criterion").out
    assert "wanda" in criteria and "Weight magnitude times the norm of the input it multiplies." in " ".join(
        criteria.split()
    )


def test_a_scan_for_other_programs(prunella: Run, shop: str) -> None:
    words = ("scan", f"{shop}:net", "--inputs", "2x3x8x8", "--ratios", "0.25,0.5")
    done = prunella(*words, "--csv", "x.csv", "--plot", "x.svg", "--json")
    assert done.code == 0, done.err
    rows = list(csv.DictReader(Path("x.csv").read_text().splitlines()))
    points = {(name, x, value) for name, curve in done.data["curves"].items() for x, value in curve}
    assert {(row["group"], float(row["removed"]), float(row["quality"])) for row in rows} == points and len(rows) == 4
    assert all(float(row["lost"]) == done.data["base"] - float(row["quality"]) for row in rows)
    picture = Path("x.svg").read_text()
    assert picture.startswith("<svg ") and "quality" in picture and "<script" not in picture and "var(" not in picture
    assert prunella(*words, "--plot", "x.png").code == 0 and Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert "group  fraction removed: quality" in prunella(*words).out
    refused = prunella(*words, "--csv", "x.csv")
    assert (
        refused.code == 2
        and "x.csv exists" in refused.err
        and prunella(*words, "--csv", "x.csv", "--overwrite").code == 0
    )
    assert "a plot is SVG or PNG" in prunella(*words, "--plot", "x.pdf").err


def test_a_study_for_a_paper(prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = "tests.experiments.experiment_parts"
    words = (
        "pareto",
        f"{parts}:make",
        "--metric",
        f"{parts}:evaluate",
        "--inputs",
        f"{parts}:example",
        "--ratios",
        "2",
    )
    done = prunella(*words, "--seeds", "1", "-o", "out", "--csv", "x.csv", "--latex", "x.tex")
    assert done.code == 0, done.err
    rows = list(csv.DictReader(Path("x.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} >= {"random"} and all(float(row["score"]) > -9 for row in rows)
    table = Path("x.tex").read_text()
    assert table.startswith(r"\begin{tabular}{lrrrrrl}") and r"\\" in table and r"\bottomrule" in table


def test_a_comparison_for_a_paper(prunella: Run, story: Any) -> None:
    Path("other.txt").write_text(" ".join(WORDS[::-1] * 5))
    line = ("compare", "in", "--data", "text.txt", "--text", "other.txt", "--recipe", "wanda", "--nsamples", "2",
            "--seqlen", "12", "--eval-seqlen", "10", "--seeds", "2", "-o", "t")  # fmt: skip
    done = prunella(*line, "--csv", "x.csv", "--latex", "x.tex", "--json")
    assert done.code == 0, done.err
    rows = list(csv.DictReader(Path("x.csv").read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("dense", "0"),
        ("dense", "1"),
        ("wanda", "0"),
        ("wanda", "1"),
    ]
    assert float(rows[3]["perplexity"]) == done.data["values"]["wanda"]["perplexity"][1]
    assert r"wanda & " in Path("x.tex").read_text() and r"$\pm$" in Path("x.tex").read_text()


def test_a_long_stage_is_heard_of_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENT", 0.05)
    with console.stage("counting", 4) as tick:
        tick()
        time.sleep(0.3)
    with console.stage("thinking"):
        time.sleep(0.2)
    with console.stage("blinking"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert "prunella: counting: 1 of 4, about 0 s left (0 s)" in lines and "prunella: thinking: at work (0 s)" in lines
    assert [line for line in lines if "blinking" in line] == [
        line for line in lines if line.startswith("prunella: blinking (")
    ]


def test_what_is_left_is_the_mean_of_the_parts() -> None:
    assert console._so_far(3, 12, 10.0) == "3 of 12, about 30 s left (10 s)"
    assert console._so_far(0, 12, 10.0) == console._so_far(1, 1, 10.0) == "at work (10 s)"
