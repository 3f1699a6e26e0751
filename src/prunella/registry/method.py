"""Decorators that record what a method is, and return the function unchanged.

The positional parameters of a criterion are the statistics that it needs (names of `prunella.stats.table.STATISTICS`).
The keyword-only parameters are its knobs. `prunella methods`, `prunella explain` and the documentation print the
record. A function that was never registered works just as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prunella.errors import RequestError, near_names

F = TypeVar("F", bound=Callable[..., Any])
MethodKind = Literal[
    "recipe",
    "criterion",
    "control",
    "granularity",
    "allocation",
    "schedule",
    "cycle",
    "solver",
    "search",
    "training",
    "recovery",
    "compression",
    "metric",
    "importer",
]
Scope = Literal["producer", "consumer", "group"]
Status = Literal["stable", "experimental"]
"""`stable`: an oracle proves the method (`docs/concepts`), and a table of the documentation measures it.
`experimental`: all other methods."""


@dataclass(frozen=True)
class Method:
    """The record of one method."""

    name: str
    kind: MethodKind
    function: Callable[..., Any]
    source: str
    status: Status
    needs: tuple[str, ...]
    knobs: tuple[inspect.Parameter, ...]
    scope: Scope

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


REGISTRY: dict[str, Method] = {}


def record(
    kind: MethodKind, *, source: str, status: Status = "experimental", scope: Scope = "producer"
) -> Callable[[F], F]:
    """The decorator that records a method of this kind."""

    def mark(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        needs = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY) if kind == "criterion" else ()
        knobs = tuple(p for p in parameters if p.kind is p.KEYWORD_ONLY)
        name = function.__name__.rstrip("_")
        if name in REGISTRY and REGISTRY[name].function.__module__ != function.__module__:
            raise TypeError(f"two methods are called {name!r}: one in {REGISTRY[name].function.__module__}")
        REGISTRY[name] = Method(name, kind, function, source, status, needs, knobs, scope)
        return function

    return mark


def control(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a control: a function from a criterion, plan or model to a worse one."""
    return record("control", source=source, status=status)


def allocation(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register an allocation."""
    return record("allocation", source=source, status=status)


def granularity(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a granularity (a frozen dataclass)."""
    return record("granularity", source=source, status=status)


def schedule(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a schedule."""
    return record("schedule", source=source, status=status)


def cycle(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a schedule that may fall between 0 and 1, so that weights come back. It still ends at exactly 1."""
    return record("cycle", source=source, status=status)


def recovery(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a way to recover."""
    return record("recovery", source=source, status=status)


def solver(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a method that finds new weights, alone or together with the mask."""
    return record("solver", source=source, status=status)


def search(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a search for the sparsity of each group."""
    return record("search", source=source, status=status)


def training(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a way to train with, or toward, sparsity: penalties, gates, drop and grow, tickets."""
    return record("training", source=source, status=status)


def compression(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a compression other than pruning: quantization, weight sharing, low rank, token reduction."""
    return record("compression", source=source, status=status)


def metric(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a metric of a pruned model."""
    return record("metric", source=source, status=status)


def importer(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register an importer of models that another tool pruned."""
    return record("importer", source=source, status=status)


def recipe(*, source: str, status: Status = "experimental") -> Callable[[F], F]:
    """Register a composition that bears a paper's name; the function returns a `Recipe`."""
    return record("recipe", source=source, status=status)


def needs_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The statistics that a criterion asks for, registered or not."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)


def knobs_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The knobs of a method with their values. `functools.partial` may have bound some of them."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def scope_of(function: Callable[..., Any]) -> Scope:
    """The scope a criterion was registered with, `producer` if it was not."""
    method = next((m for m in REGISTRY.values() if m.function is function), None)
    return method.scope if method else "producer"


_NEAR = 0.6
"""As near as `magntude` and `magnitude`; below it `nonsense` is near `cosine`."""
_LISTED = 40


def find(name: str, kind: MethodKind | None = None) -> Method:
    """The method of that name, or a `RequestError` with the nearest names."""
    known = [m.name for m in REGISTRY.values() if kind in (None, m.kind)]
    if name in known:
        return REGISTRY[name]
    hint = near_names(name, known, _NEAR) or ("" if len(known) > _LISTED else f"known are {', '.join(sorted(known))}")
    raise RequestError(f"unknown {kind or 'method'} {name!r}", hint, "`prunella methods` lists them all")
