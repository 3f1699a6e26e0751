"""Bombs for every reader; a slice of them with all tests, the whole of them with `make fuzz`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALL = float(os.environ.get("PRUNELLA_FUZZ_SECONDS") or "4") > 30
QUICK = ("plan", "artifact", "tensors", "state", "ticket", "journal", "json", "checkpoint", "old checkpoint", "recipe")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each is read in a forked process")
@pytest.mark.timeout(0 if ALL else 240)
def test_depth_repetition_and_sizes_that_are_only_declared_are_refused_at_once() -> None:
    words = () if ALL else ("--every", "6", *QUICK)
    command = [sys.executable, "-m", "tests.fuzz.bombs", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = [int(count) for count in re.findall(r"^[a-z ]+: (\d+) bombs$", done.stdout, re.MULTILINE)]
    assert len(counts) >= len(QUICK) and all(counts)
