"""One JSON file for each cell of a table, written whole or not at all, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds; if it is not there, what `make` gives, written first."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    made = make()
    write(path, json.dumps(made, indent=1) + "\n")
    return json.loads(json.dumps(made))


def write(path: Path, text: str) -> None:
    """Write a text so that readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation: `97.31 ± 0.12`."""
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else math.nan:.2f}"


def shown(values: Sequence[float]) -> str:
    """The same; one value as it is, and nothing for none."""
    return spread(values) if len(values) > 1 else "".join(f"{value:.2f}" for value in values)
