"""What holds for every folder that the demo wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prunella.app.run import PAGE, RECORD, Outcome
from prunella.io.artifact import WEIGHTS

_READ = """
import sys, torch, prunella
from prunella.model.forward import first_tensor, forward
from prunella.app.verify import plan_of
from pathlib import Path
folder, factory = Path(sys.argv[1]), sys.argv[2] or None
torch.set_num_threads(1)
with torch.inference_mode():
    found = first_tensor(forward(prunella.load(folder, factory=factory), plan_of(folder).inputs))
print(" ".join(map(str, found.flatten()[:8].tolist())))
"""
SIZES = ("parameters", "multiply-adds", "size on disk", "latency", "peak memory")


def read_in_a_fresh_process(folder: Path, factory: str = "") -> list[float]:
    """The first numbers that the stored model gives for the stored example."""
    command = [sys.executable, "-W", "ignore", "-c", _READ, str(folder), factory]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


def check(folder: Path, outcome: Outcome, measures: tuple[str, ...]) -> None:
    """The table is complete, the target met within a unit, the folder whole."""
    assert [metric.name for metric in outcome.report.metrics] == [*measures, *SIZES]
    assert [metric.name for metric in outcome.report.metrics if metric.cut is not None] == list(measures)
    before, after = outcome.plan.before, outcome.plan.after
    unit = max(row.macs_before / row.total for row in outcome.plan.rows)
    assert outcome.plan.target is not None
    assert 0 <= outcome.plan.target.absolute(before.macs) - after.macs <= 2 * unit
    disk = outcome.report.metric("size on disk")
    stored = (folder / WEIGHTS).stat().st_size
    assert disk.after < disk.before and stored < disk.before and stored == pytest.approx(disk.after, rel=0.05)
    record = json.loads((folder / RECORD).read_text())
    assert outcome.report.verdict in record["text"] and record["about"] in record["text"]
    assert all(f"\n{name} " in record["text"] for name in (*measures, *SIZES))
    assert [item["by"] for item in record["recovered"]] == [str(item.step) for item in outcome.recovered]
    assert record["outputs"] == list(outcome.outputs)
    page = (folder / PAGE).read_text().lower()
    assert all(name.lower() in page for name in measures)
