"""Hostile input to the compiled kernels under AddressSanitizer and UBSan, as `make fuzz` and `.ci/run` run it.

`PRUNELLA_FUZZ_SECONDS` says for how long, with all tiers of instructions. Where it is set but empty, ten seconds of two
tiers, which share their bodies with the others. Without it the test is skipped: the build alone takes a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALL = bool(os.environ.get("PRUNELLA_FUZZ_SECONDS"))
SECONDS = int(os.environ.get("PRUNELLA_FUZZ_SECONDS") or "10")
FLAGS = ("-DPRUNELLA_SANITIZE=ON", "-DPRUNELLA_FUZZ=ON", *(() if ALL else ("-DPRUNELLA_TIERS=avx2",)))


def run(*command: str, seconds: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


@pytest.fixture(scope="module")
def fuzz() -> str:
    """The fuzz target, built in a folder of its own so that a second run of the tests does not compile it again."""
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the sources of the kernels are not here")
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no cmake or no C++ compiler here")
    build = str(ROOT / "build" / ("fuzz" if ALL else "fuzz-slice"))
    run("cmake", "-S", str(ROOT), "-B", build, *FLAGS, seconds=120)
    run("cmake", "--build", build, "--target", "fuzz", "--parallel", "2", seconds=900)
    return str(Path(build) / "fuzz")


@pytest.mark.skipif("PRUNELLA_FUZZ_SECONDS" not in os.environ, reason="`make fuzz` and `.ci/run` run this")
@pytest.mark.timeout(1200 + SECONDS)
def test_what_is_accepted_is_right_and_what_is_hostile_is_refused(fuzz: str) -> None:
    run(fuzz, f"-max_total_time={SECONDS}", "-seed=1", seconds=SECONDS + 120)
