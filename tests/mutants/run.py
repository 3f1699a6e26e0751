"""Break every formula once and see a test go red.

    python tests/mutants/run.py [PATTERN ...]     # of names of rows files or of source files

A row says what to break: `file` below src/prunella, `find` (stands there exactly once), `replace`, and the `tests` of
which at least one must fail. Rows are in `tests/mutants/*.toml`. The sources are copied, never changed in place.
"""

from __future__ import annotations

import compileall
import fnmatch
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "prunella"
HEAVY = ("sympy", "scipy.optimize", "scipy.stats", "rich.table", "torch._dynamo", "torch.export")
"""Imported once, before the children are forked: these modules are most of the time of a short test."""
LIMIT = 600
"""Most seconds for the tests of one row."""
PASSED, RED = 100 + pytest.ExitCode.OK, 100 + pytest.ExitCode.TESTS_FAILED
"""How a child ends whose tests ran; a child that could not run them ends with 1, as Python does after an exception."""


@dataclass(frozen=True)
class Mutant:
    """One formula, broken."""

    rows: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """For the report."""
        return f"{self.file}: {' '.join(self.find.split())} -> {' '.join(self.replace.split())}"


def read(patterns: list[str]) -> list[Mutant]:
    """The rows whose file of rows, or source file, matches a pattern."""
    found = []
    for rows in sorted(Path(__file__).parent.glob("*.toml")):
        for entry in tomllib.loads(rows.read_text(encoding="utf-8"))["mutant"]:
            mutant = Mutant(rows.stem, entry["file"], entry["find"], entry["replace"], tuple(entry["tests"]))
            if any(fnmatch.fnmatch(name, p) for p in patterns for name in (mutant.rows, mutant.file)):
                found.append(mutant)
    return found


def fault(mutant: Mutant) -> str:
    """Why the row itself is wrong, or nothing."""
    source = PACKAGE / mutant.file
    if not source.is_file():
        return "there is no such file"
    times = source.read_text(encoding="utf-8").count(mutant.find)
    if times != 1:
        return f"the text stands there {times} times"
    missing = [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).is_file()]
    return f"there is no {missing[0]}" if missing else "" if mutant.tests else "it names no test"


def killed(mutant: Mutant) -> str:
    """`killed` if a test goes red on the broken copy, `SURVIVED` if all stay green, else what is wrong."""
    wrong = fault(mutant)
    if wrong:
        return f"BAD ROW ({wrong})"
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "prunella"
        shutil.copytree(PACKAGE, copy)
        target = copy / mutant.file
        target.write_text(target.read_text(encoding="utf-8").replace(mutant.find, mutant.replace), encoding="utf-8")
        log = Path(folder) / "log"
        process = multiprocessing.get_context("fork").Process(target=_try, args=(mutant.tests, folder, log))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return f"BAD ROW (no end within {LIMIT} s)"
        if process.exitcode == PASSED:
            return "SURVIVED"
        if process.exitcode == RED or (process.exitcode or 0) < 0:  # a signal: the broken line ended the process
            return "killed"
        return f"BAD ROW (pytest: {log.read_text().strip().splitlines()[-1:]})"


def _try(tests: tuple[str, ...], folder: str, log: Path) -> None:
    """Run the tests on the copy in `folder`, in a process that has torch already but not prunella."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.path[:0] = [folder, str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join((folder, str(ROOT)))  # for tests that start processes
    os.chdir(ROOT)
    # An installation that is edited in place finds its own sources before any path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    spec = importlib.util.find_spec("prunella")
    if spec is None or not str(spec.origin).startswith(folder):
        print(f"the tests would not run on the broken copy but on {spec and spec.origin}")
        sys.stdout.flush()
        os._exit(9)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(100 + int(code))


def main() -> int:
    """Try all; 1 if one survived."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    compileall.compile_dir(PACKAGE, quiet=1)  # a copy then compiles its broken file alone
    mutants = read(sys.argv[1:] or ["*"])
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        trials = {pool.submit(killed, mutant): mutant for mutant in mutants}
        for trial in as_completed(trials):
            alive += trial.result() != "killed"
            print(f"{trial.result():9} {trials[trial].name}", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} killed")
    return 1 if alive or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
