"""Whatever happens to a run or to its files: nothing is lost, nothing is let in, and the second call ends as if alone.

A slice runs with all tests. `make faults` runs every round of every verb (PRUNELLA_FAULTS=all), which takes long.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.verbs import VERBS

OTHERS = ("moments", "damage", "exchanged", "forged", "together", "room", "traces")
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


def told(shim: Path, *words: str) -> str:
    """What some rounds say."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "tests.faults", *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    return done.stdout + done.stderr[-2000:]


@pytest.fixture(scope="module")
def slices(shim: Path) -> str:
    """What both slices say. One process makes them: its start, and the runs that they share, take most of the time."""
    grid = ("grid", "--verbs", "save over,scan", "--most", "2")
    return told(shim, *grid, "+", ",".join(OTHERS), "--verbs", "scan", "--most", "2", "--stride", "3")


def faults_survived(said: str, name: str, verb: str) -> int:
    """How many faults of a round a verb has survived; 0 if there was one that it has not survived."""
    line = re.search(rf"^{name}, {verb}: (\d+) faults, 0 not survived$", said, re.MULTILINE)
    return int(line[1]) if line else 0


def test_a_slice_of_the_grid(slices: str) -> None:
    assert faults_survived(slices, "grid", "save over") >= 16 and faults_survived(slices, "grid", "scan") >= 16, slices


def test_a_slice_of_every_other_round(slices: str) -> None:
    """Signals, flipped bits, exchanged files, two runs and locks, too little room, modes: a few of each."""
    assert all(faults_survived(slices, name, "scan") for name in OTHERS), slices


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ALL, reason="make faults")
@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_fault_of_a_verb(shim: Path, verb: str) -> None:
    stride = os.environ.get("PRUNELLA_FAULTS_STRIDE", "1")
    said = told(shim, ",".join(("grid", *OTHERS)), "--verbs", verb, "--stride", stride)
    print(said)
    assert all(faults_survived(said, name, verb) for name in ("grid", *OTHERS)), said
