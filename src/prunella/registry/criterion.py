"""The decorator of criteria. It alone of all decorators knows the table of statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prunella.registry.method import Scope, Status, needs_of, record
from prunella.stats.table import STATISTICS, why_unknown

F = TypeVar("F", bound=Callable[..., Any])


def criterion(*, source: str, status: Status = "experimental", scope: Scope = "producer") -> Callable[[F], F]:
    """Register a criterion.

    `scope` says which of a unit's weights are summed into its score when units are channels or heads: the `producer`
    rows only (filter norm), the `consumer` columns only, or the whole coupled `group`. Errors: TypeError for a
    positional parameter that names no statistic.
    """

    def mark(function: F) -> F:
        unknown = [name for name in needs_of(function) if name not in STATISTICS]
        if unknown:
            raise TypeError(f"{function.__name__}: unknown statistic {unknown[0]!r}; {why_unknown(unknown[0])}")
        return record("criterion", source=source, status=status, scope=scope)(function)

    return mark
