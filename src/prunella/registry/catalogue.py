"""Every method of the library in one list, for `methods`, `explain` and the documentation."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, get_args

from prunella.registry.method import REGISTRY, Method, MethodKind, find

HOMES = (
    "criteria",
    "granularity",
    "allocation",
    "schedules",
    "planning.rounds",
    "planning.recipes",
    "solvers",
    "compress",
    "compress.storage",
    "io.add_biases",
    "io.importers",
    "transform.controls",
    "transform.permute",
    "train",
    "recovery",
    "search",
    "lottery",
    "llm",
    "llm.streaming",
    "tokens",
    "metrics",
    "experiments.pareto_experiment",
)
_ORDER = get_args(MethodKind)


def load_all() -> None:
    """Import every module that registers methods."""
    for home in HOMES:
        importlib.import_module(f"prunella.{home}")


def methods() -> list[Method]:
    """All registered methods by kind, then by name."""
    load_all()
    return sorted(REGISTRY.values(), key=lambda method: (_ORDER.index(method.kind), method.name))


def lookup(name: str, kind: MethodKind | None = None) -> Method:
    """The method of that name; a RequestError that names the nearest ones otherwise."""
    load_all()
    return find(name, kind)


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    return {
        "name": method.name,
        "kind": method.kind,
        "summary": method.summary,
        "source": method.source,
        "status": method.status,
        "needs": list(method.needs),
        "knobs": {knob.name: _default(knob) for knob in method.knobs},
        "doc": inspect.getdoc(method.function) or "",
    }


def _default(knob: inspect.Parameter) -> str:
    return "required" if knob.default is inspect.Parameter.empty else repr(knob.default)
