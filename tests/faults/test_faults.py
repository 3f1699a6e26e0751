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


def survived(shim: Path, rounds: str, *words: str) -> str:
    """What some rounds say. Fails if a fault was not survived."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "tests.faults", rounds, *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_slice_of_the_grid(shim: Path) -> None:
    said = survived(shim, "grid", "--verbs", "save over,scan", "--most", "2")
    assert said.count(" 0 not survived") == 2 and said.count(" faults") == 2


def test_a_slice_of_every_other_round(shim: Path) -> None:
    """Signals, flipped bits, exchanged files, two runs and locks, too little room, modes: a few of each."""
    said = survived(shim, ",".join(OTHERS), "--verbs", "scan", "--most", "2", "--stride", "3")
    assert all(re.search(rf"^{name}, scan: [1-9]\d* faults, 0 not survived$", said, re.MULTILINE) for name in OTHERS)


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ALL, reason="make faults")
@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_fault_of_a_verb(shim: Path, verb: str) -> None:
    stride = os.environ.get("PRUNELLA_FAULTS_STRIDE", "1")
    print(survived(shim, ",".join(("grid", *OTHERS)), "--verbs", verb, "--stride", stride))
