"""The command line options that correspond to Python names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from prunella.registry import catalogue

_TARGETS = ("Sparsity", "Params", "MACs", "Bytes", "Latency")
_STEPS = {
    "recalibrate_bn": "bn",
    "reconstruct": "reconstruct",
    "distill": "distill:STEPS",
    "finetune": "finetune:STEPS",
}
_VERBS = {
    "prune": "run", "plan": "plan", "report": "report", "export": "export", "scan": "scan", "pareto": "pareto",
    "compare": "compare", "solve_folder": "llm", "import_plan": "import", "couple": "inspect",
}  # fmt: skip
_OTHER_OPTIONS = {"ratios": "ratio", "counts": "count"}
_OPTIONS = frozenset(
    "data loss skip only target min_density round_to equal_widths seed remove keep ratio count".split()
)
_PATTERNS = {"NM": "2:4", "Block": "16x16"}


def typed(names: Iterable[str]) -> list[str]:
    """`--recipe wanda` for `pr.criteria.wanda`, `--pattern 2:4` for `pr.NM(2, 4)`; each once, none for other names."""
    catalogue.load_all()
    return list(dict.fromkeys(line for name in names if (line := _line(name))))


def _line(name: str) -> str:
    path, _, arguments = name.partition("(")
    called = path.rpartition(".")[2]
    if called.endswith("="):
        option = _OTHER_OPTIONS.get(called[:-1], called[:-1])
        return f"--{option.replace('_', '-')}" if option in _OPTIONS else ""
    if called in _PATTERNS:
        numbers = re.findall(r"\d+", arguments)
        separator = ":" if called == "NM" else "x"
        return f"--pattern {separator.join(numbers) if len(numbers) == 2 else _PATTERNS[called]}"
    if called == "Threshold":
        return "--threshold 0.01"
    if called in _TARGETS:
        return f"--target {called.lower()}={0.9 if called == 'Sparsity' else 0.5}"
    if called in _STEPS:
        return f"--recover {_STEPS[called]}"
    if called in _VERBS:
        return f"prunella {_VERBS[called]}"
    return _method(called)


def _method(name: str) -> str:
    method = next((method for method in catalogue.methods() if method.name == name), None)
    if method is None:
        return ""
    if method.kind in ("recipe", "criterion"):
        return f"--recipe {name}"
    if method.kind == "allocation":
        return f"--allocation {name}"
    if method.kind == "importer":
        return f"prunella import --importer {name}"
    if method.kind == "granularity":
        knobs = inspect.signature(method.function).parameters.values()
        return "" if any(knob.default is knob.empty for knob in knobs) else f"--granularity {name.lower()}"
    return ""
