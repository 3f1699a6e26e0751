"""A slice of the fuzzing of all readers, in a process of its own; PRUNELLA_FUZZ_SECONDS: for how long (4)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("PRUNELLA_FUZZ_SECONDS") or "4")
QUICK = ("plan", "artifact", "tensors", "shards", "state", "ticket", "journal", "json", "checkpoint", "old checkpoint",
         "compressed tensors", "recipe", "source of an import")  # fmt: skip


@pytest.mark.timeout(240 + 2 * int(SECONDS))
def test_nothing_but_errors_of_the_package_and_nothing_that_changed_is_accepted() -> None:
    readers = () if SECONDS > 30 else QUICK  # programs and folders of transformers take seconds to begin with
    command = [sys.executable, "-m", "tests.fuzz.worker", str(SECONDS), *readers]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines and "done" in lines[-1], done.stderr[-3000:]
    assert lines[-1]["done"] > 50
    assert lines[:-1] == [], "\n\n".join(f"{x['reader']} --case {x['case']}: {x['wrong']}" for x in lines[:-1][:5])
