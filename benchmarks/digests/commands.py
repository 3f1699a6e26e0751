"""Cells of `digests.py` that ask the command line: the numbers in its JSON, and the folders that it writes."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cells import cells
from methods import NET

import prunella as pr

MODULE = "from methods import DATA, NET, loss\n\nnet = NET.model\nloader = lambda: DATA\n"
LINES = {
    "plan channels": "plan shop:net --inputs 4x3x12x12 --recipe group_norm --target macs=0.5 --json",
    "plan 2:4": "plan shop:net --inputs 4x3x12x12 --pattern 2:4 --skip 0 --json",
    "plan taylor": "plan shop:net --inputs 4x3x12x12 --recipe taylor --allocation global --target params=0.6 "
                   "--data shop:loader --loss shop:loss --json",
    "inspect": "inspect shop:net --inputs 4x3x12x12 --json",
    "run": "run shop:net --inputs 4x3x12x12 --recipe magnitude --target macs=0.5 --recover bn,reconstruct "
           "--data shop:loader -o half --json",
}  # fmt: skip


def typed(line: str) -> Any:
    """What a command line prints as JSON."""
    out, quiet = io.StringIO(), contextlib.redirect_stderr(io.StringIO())
    with patch.object(sys, "argv", ["prunella", *line.split()]), contextlib.redirect_stdout(out), quiet:
        try:
            runpy.run_module("prunella", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                return ["exit", ended.code]
    return json.loads(out.getvalue())


def numbers(data: Any) -> Any:
    """JSON without its words: numbers, and names of what they are of where these are names of layers."""
    if isinstance(data, dict):
        rows = {key: numbers(value) for key, value in data.items() if not isinstance(value, str)}
        return sorted(rows.values(), key=repr)
    if isinstance(data, list):
        return [numbers(value) for value in data if not isinstance(value, str)]
    return data


@cells("command line", LINES)
def command(line: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), patch.object(sys, "path", ["", *sys.path]):
        Path("shop.py").write_text(MODULE, encoding="utf-8")
        sys.modules.pop("shop", None)
        data = typed(line)
        if not line.startswith("run"):
            return {"numbers": numbers(data)}
        return {"params": data["params"], "model": pr.load("half", factory=NET.model)}
