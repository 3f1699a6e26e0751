"""What holds for every folder that the demo wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prunella.app.demo.run import PAGE, RECORD, Result

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


def check(result: Result, measures: tuple[str, ...]) -> None:
    """The table is complete, the target met within a unit, the folder whole."""
    assert [row[0] for row in result.rows()] == [*measures, *SIZES]
    assert all(cell for row in result.rows() for i, cell in enumerate(row) if i != 2 or row[0] in measures)
    before, after = result.plan.before, result.plan.after
    unit = max(row.macs_before / row.total for row in result.plan.rows)
    assert 0 <= result.plan.target.absolute(before.macs) - after.macs <= 2 * unit
    assert result.disk[1] < result.disk[0]
    record = json.loads((result.folder / RECORD).read_text())
    assert record["verdict"] == result.verdict
    assert [item["by"] for item in record["healed"]] == [by for by, _ in result.healed]
    page = (result.folder / PAGE).read_text().lower()
    assert all(name.lower() in page for name in measures)
    assert result.verdict in str(result)
