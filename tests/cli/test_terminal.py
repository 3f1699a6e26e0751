"""What reaches a terminal: no control characters, nothing wider than it, nothing after a reader has left."""

from __future__ import annotations

import json
import logging
import os
import pty
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.cli import main
from prunella.cli.console import emit, note, prepare_streams
from prunella.errors import BadInput, near_names, printable
from prunella.io.plan_file import save_plan
from prunella.measure.text import fitted, table, without_folders
from prunella.reporting.page import render_page
from tests.cli.conftest import Run
from tests.faults.processes import start

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp\r\x9b31m\u2066\ud800\u200b"
MARKS = ("\x1b", "\x07", "\u202e", "\r", "\x9b", "\u2066", "\ud800", "\u200b")
PYTHON = [sys.executable, "-m", "prunella"]


def clean(text: str) -> bool:
    """Whether nothing in a text is obeyed by a terminal."""
    return all(c.isprintable() or c == "\n" for c in text)


class Evil(nn.Module):
    """A model with a module of a name that a terminal would obey."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, 32))
        self.add_module("last", nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


NAME = "\x1b]0;owned\x07\x1b[2J\u202egnp"


def test_names_in_a_plan_do_not_reach_the_terminal(prunella: Run, tmp_path: Path) -> None:
    model = Evil(NAME).eval()
    plan = pr.plan(model, torch.ones(2, 16), pr.Recipe(pr.magnitude, pr.Channel()), target=pr.MACs(0.5))
    file = save_plan(plan, tmp_path / "evil.plan")
    for words in ((), ("--json",)):
        shown = prunella("show", str(file), *words)
        assert shown.code == 0 and clean(shown.out) and "gnp" in shown.out
        assert "\\x1b]0;owned" in shown.out or "\\u001b]0;owned" in shown.out
    assert json.loads(prunella("show", str(file), "--json").out)["rows"][0]["name"] == NAME  # as data it is what it was
    assert clean(str(plan))
    page = render_page(pr.report(model, pr.shrink(model, plan), torch.ones(2, 16), plan=plan, rounds=5))
    assert not any(mark in page for mark in MARKS) and "<script" not in page and "\\x1b]0;owned" in page


def test_errors_notes_results_and_logs_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    error = BadInput(f"what {EVIL}", f"why {EVIL}", f"todo {EVIL}")
    assert clean(str(error)) and clean(error.what) and "\\x1b[2J" in error.why
    note(f"one\ntwo {EVIL}")
    emit([EVIL.replace("\ud800", "")], f"a\n{EVIL}", as_json=False)
    emit([EVIL.replace("\ud800", "")], "", as_json=True)
    shown = capsys.readouterr()
    assert clean(shown.out) and clean(shown.err) and shown.err.count("\n") == 1
    assert clean(table(("name",), [(EVIL,)]))
    prepare_streams()
    assert logging.lastResort is not None and logging.lastResort.formatter is not None
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "log %s", (EVIL,), None)
    assert clean(logging.lastResort.formatter.format(record))


def test_what_is_shown_as_itself_stays() -> None:
    kept = "Größe 模型 é 1 µs → ± – \u00a0\u202f🙂\nnext"
    assert printable(kept) == kept
    assert printable("a\tb") == "a    b"


def test_an_error_in_the_users_code_is_printable(prunella: Run, shop: str) -> None:
    Path("evil.py").write_text(f"def net():\n    raise ValueError({EVIL!r})\n")
    for words in ((), ("--debug",), ("--json",)):
        result = prunella("plan", "evil:net", "--inputs", "1x3", "--target", "macs=0.5", *words)
        assert result.code == 3 and clean(result.err) and clean(result.out)
    os.environ.pop("PRUNELLA_DEBUG", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "--json"), "Missing argument"),
        (("plam", "--json"), "Did you mean 'plan'"),
        (("plan", "x:y", "--tarket", "macs=0.5", "--json"), "--target"),
        (("plan", "x:y", "--seed", "one", "--json"), "Invalid value for '--seed'"),
        (("--json",), "No such option"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_told_as_json_too(prunella: Run, words: tuple[str, ...], said: str) -> None:
    result = prunella(*words)
    assert result.code == 2 and result.data["exit"] == 2 and said in result.data["error"]
    assert "Usage: prunella" in result.err


@pytest.mark.parametrize("words", ["methods", "--version"])
def test_nobody_reads_the_output(tmp_path: Path, words: str) -> None:
    line = f"{' '.join(PYTHON)} {words}"
    for shell in (f"{line} | true", f"{line} >&-"):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), shell


def test_nobody_reads_the_progress_and_the_work_is_done(shop: str, tmp_path: Path) -> None:
    words = f"plan {shop}:net --inputs 1x3x8x8 --target macs=0.5 -o x.plan"
    for number, end in enumerate(("2>&-", "2>&1 | true")):
        (tmp_path / "x.plan").unlink(missing_ok=True)
        done = subprocess.run(["bash", "-c", f"{' '.join(PYTHON)} {words} {end}"], capture_output=True, cwd=tmp_path)
        assert done.returncode == 0 and (tmp_path / "x.plan").is_file(), number


def test_methods_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen([*PYTHON, "methods"], stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    text = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        text += part
        if not part:
            break
    assert process.wait() == 0
    lines = text.decode().splitlines()
    assert len(lines) > 100 and max(map(len, lines)) == 80 and "criterion" in text.decode()


def test_a_line_that_is_too_wide_is_cut() -> None:
    assert fitted("abcdef\nab", 4) == "abc…\nab"
    assert fitted("模型模型", 5) == "模型…"


def test_near_names_of_values(prunella: Run, shop: str) -> None:
    image = ("--inputs", "1x3x8x8")
    for words, near in (
        (("plan", f"{shop}:net", *image, "--target", "mac=0.5"), "did you mean macs"),
        (("run", f"{shop}:net", *image, "--target", "macs=0.5", "--recover", "distil:3"), "did you mean distill"),
        (("llm", "x", "--recipe", "sparsgpt", "--data", "x"), "did you mean sparsegpt"),
        (("demo", "--model", "digit"), "did you mean digits"),
        (("bench", f"{shop}:net", *image, "--backends", "eagr"), "did you mean eager"),
        (("methods", "criterions"), "did you mean criterion"),
        (("plan", f"{shop}:net", *image, "--target", "macs=0.5", "--recipe", "WANDDA"), "did you mean wanda"),
    ):
        result = prunella(*words)
        assert result.code == 2 and near in result.err, words
    assert near_names("zzz", ["abc"]) == ""


def test_a_metric_that_is_no_number(prunella: Run, shop: str) -> None:
    module = Path(f"{shop}.py")
    code = "\n\ndef sometimes(model):\n    return float('nan') if model[0].out_channels < 8 else 1.0\n"
    module.write_text(module.read_text() + code + "\n\ndef never(model):\n    return float('nan')\n")
    for metric, why in (("sometimes", "without 2 units"), ("never", "the dense model")):
        words = ("--metric", f"{shop}:{metric}", "--ratios", "0.25")
        result = prunella("scan", f"{shop}:net", "--inputs", "1x3x8x8", *words, "-o", metric)
        assert result.code == 3 and "it gave NaN for" in result.err and why in result.err and result.out == ""


def test_a_limit_of_the_size_of_files_is_5_for_every_verb(shop: str, tmp_path: Path) -> None:
    def limit() -> None:
        # The streams of the process, where pytest has put its own.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    model = f"{shop}:net --inputs 1x3x8x8"
    for words in (f"scan {model} -o s", f"run {model} --target macs=0.5 -o r", f"export {model} -o x.safetensors"):
        done = start(partial(main, words.split()), tmp_path, first=limit).wait()
        assert done.code == 5 and "full" in done.said and "Traceback" not in done.said, done.said


def test_folders_are_cut_off_in_records() -> None:
    told = (
        "No such file: '/home/alice/data/x.txt', C:\\Users\\alice\\x.pt; ~/x/y.pt, 3/4, a/b, https://x.org/a/b, and/or"
    )
    assert without_folders(told) == "No such file: 'x.txt', x.pt; y.pt, 3/4, a/b, https://x.org/a/b, and/or"
