"""Kills, failures and half writes at the n-th call of a verb: nothing is lost, and the second call ends as if alone.

A slice runs with all tests. `make faults` runs every fault of every verb (PRUNELLA_FAULTS=all), which takes long.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.verbs import VERBS

ROOT = Path(__file__).parents[2]
ALL = os.environ.get("PRUNELLA_FAULTS", "") == "all"
COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="the shim needs a C compiler, and Linux"
)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled."""
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def grid(shim: Path, *words: str) -> str:
    """What the grid says. Fails if a fault was not survived."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "tests.faults.grid", *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_slice_of_the_grid(shim: Path) -> None:
    said = grid(shim, "--verbs", "save over,scan", "--most", "2")
    assert said.count(" 0 not survived") == 2 and said.count("faults") == 2


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ALL, reason="make faults")
@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_fault_of_a_verb(shim: Path, verb: str) -> None:
    stride = os.environ.get("PRUNELLA_FAULTS_STRIDE", "1")
    print(grid(shim, "--verbs", verb, "--stride", stride))
