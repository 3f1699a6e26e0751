"""Batches with other arguments than the example, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Variant:
    """A batch with other arguments. changes: each in words, such as `mode='turned'`.

    parts: the same arguments, each in a batch of its own, where this one has several.
    """

    changes: tuple[str, ...]
    batch: Any
    parts: tuple[Variant, ...] = ()

    @property
    def text(self) -> str:
        """The arguments, in words."""
        return listed_arguments(self.changes)


@dataclass(frozen=True)
class Variants:
    """Batches on which a cut has to be right too. untried: arguments of which no other value runs."""

    batches: tuple[Variant, ...] = ()
    untried: tuple[str, ...] = ()


_LISTED = 3


def listed_arguments(changes: Iterable[str]) -> str:
    """Arguments in words, the first of many."""
    return f"with {listed(tuple(dict.fromkeys(changes)))}"


def listed(texts: tuple[str, ...]) -> str:
    """The first of many texts, and how many more there are."""
    rest = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return f"{', '.join(texts[:_LISTED])}{rest}"
