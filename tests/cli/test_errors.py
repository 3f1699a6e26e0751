"""A user's mistake is three short lines and an exit code; nothing is lost and nothing is half written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunella.cli.console import explain_error
from prunella.errors import BadInput, CheckFailed, Interrupted, MissingExtra, NotSupported, RequestError, TargetMissed
from tests.cli.conftest import Run

IMAGE = ("--inputs", "1x3x8x8")
HALF = ("--target", "macs=0.5")


@pytest.mark.parametrize(
    ("words", "code", "say"),
    [
        (("plan", "{shop}:net", *IMAGE), 2, "target"),
        (("plan", "{shop}:net", *IMAGE, "--target", "half"), 2, "cannot read the target"),
        (("plan", "{shop}:net", *IMAGE, "--target", "sparsity=1.5"), 2, "out of range"),
        (("plan", "{shop}:net", *IMAGE, "--target", "macs=50"), 2, "use --target macs=50% or --target macs=0.05k"),
        (
            ("run", "{shop}:net", *IMAGE, "--target", "params = 30", "-o", "out"),
            2,
            "30 % of the dense model's, or 30 in",
        ),
        (("plan", "{shop}:net", *IMAGE, "--target", "macs=0.0000001"), 1, "cannot be met"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--recipe", "magnitudo"), 2, "did you mean magnitude"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--recipe", "uniform"), 2, "is not a recipe"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--allocation", "globall"), 2, "did you mean global"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--granularity", "chanel"), 2, "did you mean Channel"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--granularity", "NM"), 2, "--pattern"),
        (("plan", "{shop}:net", *IMAGE, "--pattern", "two of four"), 2, "cannot read the pattern"),
        (("plan", "{shop}:net", *IMAGE, "--pattern", "4:2"), 2, "not a pattern"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--skip", "nothing.*"), 2, "nothing.*"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--recipe", "taylor"), 2, "pass --data and --loss"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--data", "{shop}:empty", "--recipe", "wanda"), 3, "no batches"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--data", "{shop}:number"), 3, "no batches"),
        (("plan", "{shop}:net", "--inputs", "1x4x8x8", *HALF), 3, "fails on the example input 1x4x8x8"),
        (("plan", "{shop}:net", *HALF), 2, "give --inputs"),
        (("plan", "{shop}:broken", *IMAGE, *HALF), 3, "ValueError: no weights in sight"),
        (("plan", "{shop}:nett", *IMAGE, *HALF), 2, "did you mean net"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "--weights", "none.safetensors"), 3, "does not exist"),
        (("plan", "{shop}:net", *IMAGE, *HALF, "-o", "no/such/folder/x.plan"), 2, "cannot write"),
        (("demo", "--model", "imagenet"), 2, "auto, minilm, digits"),
        (("show", "none.plan"), 3, "no plan"),
        (("verify", "nowhere"), 3, "no such folder"),
        (("report", "nowhere"), 3, "no report"),
        (("run", "{shop}:net", *IMAGE, *HALF, "--recover", "magic"), 2, "cannot read the recovery"),
        (("run", "{shop}:net", *IMAGE, *HALF, "--recover", "distill"), 2, "distill:STEPS"),
        (("run", "{shop}:net", *IMAGE, *HALF, "--recover", "bn"), 2, "pass --data"),
        (("run", "{shop}:net", *IMAGE, *HALF, "--recipe", "sparsegpt"), 2, "prunella llm MODEL --recipe sparsegpt"),
        (("run", "{shop}:net", *IMAGE, *HALF, "--max-drop", "0.1"), 2, "--metric"),
        (("run", "{shop}:hungry", *IMAGE, *HALF), 5, "out of memory"),
        (("run", "{shop}:interrupted", *IMAGE, *HALF), 7, "interrupted"),
    ],
)
def test_mistakes(prunella: Run, shop: str, words: tuple[str, ...], code: int, say: str) -> None:
    result = prunella(*(word.replace("{shop}", shop) for word in words))
    lines = [line for line in result.err.splitlines() if not line.endswith(" s)")]
    assert result.code == code, result.err
    assert say in result.err and result.out == "" and "Traceback" not in result.err
    assert lines[0].startswith("prunella: ") and 1 <= len(lines) <= 3
    assert sorted(path.suffix for path in Path.cwd().iterdir() if path.name != "__pycache__") == [".py"]


def test_an_error_as_json(prunella: Run, shop: str) -> None:
    result = prunella("plan", f"{shop}:broken", *IMAGE, *HALF, "--json")
    assert result.code == 3
    assert result.data["exit"] == 3 and "ValueError" in result.data["why"] and result.data["todo"]


def test_an_unknown_option_is_misuse(prunella: Run) -> None:
    assert prunella("plan", "x:y", "--tarket", "macs=0.5").code == 2
    assert prunella("plam").code == 2


def test_a_folder_that_exists_is_left_alone(prunella: Run, shop: str) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    for extra in ((), ("--overwrite",)):
        result = prunella("run", f"{shop}:net", *IMAGE, *HALF, "-o", "out", *extra)
        assert result.code == 2 and "out" in result.err
        assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_a_folder_of_a_run_asks_for_its_factory(prunella: Run, shop: str) -> None:
    prunella("run", f"{shop}:net", *IMAGE, *HALF, "-o", "out")
    result = prunella("export", "out", "-o", "x.pt2")
    assert result.code == 2 and f"{shop}:net" in result.err and "--factory" in result.err
    assert prunella("inspect", "out", "--factory", f"{shop}:net", "--json").data["params"] > 0


def test_a_file_that_exists_is_not_overwritten(prunella: Run, shop: str) -> None:
    Path("x.safetensors").write_text("mine")
    assert prunella("export", f"{shop}:net", *IMAGE, "-o", "x.safetensors").code == 2
    assert Path("x.safetensors").read_text() == "mine"
    assert prunella("export", f"{shop}:net", *IMAGE, "-o", "x.safetensors", "--overwrite").code == 0


def test_an_own_result_is_replaced_when_asked(prunella: Run, shop: str) -> None:
    assert prunella("run", f"{shop}:net", *IMAGE, *HALF, "-o", "out").code == 0
    assert prunella("run", f"{shop}:net", *IMAGE, *HALF, "-o", "out").code == 2
    assert prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.9", "-o", "out", "--overwrite").code == 0
    assert prunella("report", "out", "--json").data["target"] == "macs=0.9"


def test_a_missed_gate_writes_nothing(prunella: Run, shop: str) -> None:
    gate = ("--metric", f"{shop}:kept_filters", "--max-drop", "0.01")
    result = prunella("run", f"{shop}:net", *IMAGE, *HALF, *gate, "-o", "out")
    assert result.code == 1 and "--max-drop allows 0.01" in result.err and not Path("out").exists()


def test_data_that_can_be_read_once_is_kept(prunella: Run, shop: str) -> None:
    data = (
        "--data",
        f"{shop}:endless_once",
        "--loss",
        f"{shop}:loss",
        "--recipe",
        "taylor",
        "--recover",
        "bn,reconstruct",
    )
    assert prunella("run", f"{shop}:net", *IMAGE, *HALF, *data, "-o", "out").code == 0


def test_debug_shows_the_traceback_wherever_it_stands(prunella: Run, shop: str) -> None:
    result = prunella("plan", f"{shop}:broken", *IMAGE, *HALF, "--debug")
    assert result.code == 3 and "Traceback" in result.err and "prunella: " in result.err
    os.environ.pop("PRUNELLA_DEBUG", None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("x"), 2),
        (MissingExtra("x"), 2),
        (TargetMissed("x"), 1),
        (CheckFailed("x"), 1),
        (BadInput("x"), 3),
        (NotSupported("x"), 6),
        (Interrupted("x"), 7),
        (KeyboardInterrupt(), 7),
        (MemoryError(), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 3),
        (TypeError("oh"), 70),
        (AssertionError(), 70),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    trouble = explain_error(error)
    assert trouble.code == code and trouble.what and "\n" not in trouble.what + trouble.why + trouble.todo


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_with_7_and_leaves_nothing(shop: str, tmp_path: Path, number: signal.Signals) -> None:
    """A real signal to a real process, in the middle of the data of the user."""
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef data():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    words = ["run", f"{shop}:net", *IMAGE, *HALF, "--data", "slow:data", "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prunella", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7 and "interrupted" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.run").exists()


EARLY = """
import os, signal, sys
from prunella.cli import console, main
def asked(): os.kill(os.getpid(), signal.{name})
console.prepare_streams = asked
sys.argv = ["prunella", "methods"]
main()
"""
LATE = """
import atexit, os, signal, sys
from prunella.cli import main
atexit.register(os.kill, os.getpid(), signal.{name})
sys.argv = ["prunella", "--version"]
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("script", "code", "out"), [(EARLY, 7, ""), (LATE, 0, "prunella ")], ids=["early", "late"])
def test_a_signal_before_a_verb_begins_or_after_it_has_ended(script: str, code: int, out: str, name: str) -> None:
    """Neither shows a traceback, and what is done stays done."""
    line = [sys.executable, "-c", script.format(name=name)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "") and done.stdout.startswith(out)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m prunella methods --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "[\n"


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "{shop}:net", *IMAGE, *HALF, "-o", "no/such/x.plan"),
        ("export", "{shop}:net", *IMAGE, "-o", "mine.txt/x.safetensors"),
        ("run", "{shop}:net", *IMAGE, *HALF, "-o", "mine.txt/out"),
        ("scan", "{shop}:net", *IMAGE, "-o", "mine.txt"),
        ("inspect", "{shop}:net", *IMAGE, "--html", "no/x.html"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(
    prunella: Run, shop: str, words: tuple[str, ...]
) -> None:
    Path("mine.txt").write_text("mine")
    result = prunella(*(word.replace("{shop}", shop) for word in words))
    assert result.code == 2 and "cannot write" in result.err and "loading" not in result.err, result.err
    assert Path("mine.txt").read_text() == "mine"


@pytest.mark.parametrize("output", ["n" * 300, "/".join(["p" * 200] * 25), "loop", "loop/x", "dangling/x"])
def test_an_output_that_no_path_can_be_is_found_before_any_work(prunella: Run, shop: str, output: str) -> None:
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    source = (f"{shop}:net", *IMAGE)
    for line in (
        ("plan", *source, *HALF, "-o", output),
        ("export", *source, "-o", output),
        ("run", *source, *HALF, "-o", output),
        ("scan", *source, "-o", output),
        ("inspect", *source, "--html", output),
        ("llm", "in", "--data", f"{shop}:loader", "-o", output),
    ):
        result = prunella(*line)
        assert result.code == 2 and "cannot write" in result.err and "loading" not in result.err, result.err
    assert sorted(path.name for path in Path().iterdir()) == ["dangling", "loop", f"{shop}.py"]


def test_the_format_of_an_export_is_checked_before_any_work(prunella: Run, shop: str) -> None:
    result = prunella("export", f"{shop}:net", *IMAGE, "-o", "small.bin")
    assert result.code == 2 and "unknown export format 'bin'" in result.err and "loading" not in result.err


def test_a_file_that_is_read_is_not_written(prunella: Run, shop: str) -> None:
    assert prunella("export", f"{shop}:net", *IMAGE, "-o", "w.safetensors").code == 0
    before = Path("w.safetensors").read_bytes()
    Path("link").symlink_to(".")
    for output in ("w.safetensors", "link/w.safetensors"):
        line = ("export", f"{shop}:net", "--weights", "w.safetensors", *IMAGE, "-o", output, "--overwrite")
        result = prunella(*line)
        assert result.code == 2 and "is the same as" in result.err and Path("w.safetensors").read_bytes() == before


TABLES = {
    "scan --csv": ("scan", "{shop}:net", *IMAGE, "--ratios", "0.5", "--csv"),
    "scan --plot": ("scan", "{shop}:net", *IMAGE, "--ratios", "0.5", "--plot"),
    "inspect": ("inspect", "{shop}:net", *IMAGE, "--html"),
    "bench": ("bench", "{shop}:net", *IMAGE, "--plot"),
    "pareto": ("pareto", "{shop}:net", "--metric", "{shop}:kept_filters", "--inputs", "{shop}:loader", "--csv"),
    "compare": ("compare", "in", "--data", "text.svg", "--text", "more.txt", "--latex"),
}


@pytest.mark.parametrize("verb", TABLES)
def test_what_lies_beside_a_result_replaces_nothing_that_is_read(prunella: Run, shop: str, verb: str) -> None:
    """The weights, the text, the file of the user's own code; by its name and by a link to it."""
    read = Path("text.svg" if verb == "compare" else f"{shop}.py")
    Path("text.svg").write_text("a b c")
    Path("link.svg").symlink_to(read)
    before = read.read_bytes()
    for output in ("link.svg", str(read)):
        result = prunella(*(word.format(shop=shop) for word in TABLES[verb]), output, "--overwrite")
        assert result.code == 2 and ("is the same as" in result.err or "cannot draw" in result.err)
        assert read.read_bytes() == before


def test_two_results_are_two_files_and_none_is_the_journal(prunella: Run, shop: str) -> None:
    line = ("scan", f"{shop}:net", *IMAGE, "--ratios", "0.5", "-o", "out", "--overwrite")
    twice = prunella(*line, "--csv", "x.svg", "--plot", "./x.svg")
    assert twice.code == 2 and "is asked for twice" in twice.err and not Path("out").exists()
    assert prunella(*line).code == 0
    before = Path("out/journal.sqlite").read_bytes()
    result = prunella(*line, "--csv", "out/journal.sqlite")
    assert result.code == 2 and "is the same as" in result.err and Path("out/journal.sqlite").read_bytes() == before


def test_a_plan_replaces_a_plan_and_nothing_else(prunella: Run, shop: str) -> None:
    line = ("plan", f"{shop}:net", *IMAGE, *HALF, "-o")
    assert [prunella(*line, "x.plan").code for _ in range(2)] == [0, 0]
    Path("thesis.txt").write_text("mine")
    result = prunella(*line, "thesis.txt")
    assert result.code == 2 and "exists, and is not a plan" in result.err and Path("thesis.txt").read_text() == "mine"
    result = prunella(*line, f"{shop}.py")
    assert result.code == 2 and Path(f"{shop}.py").read_text().startswith("\nimport torch")
