"""Many arguments at once: a run with other values of all of them tells as much as one run for each, if it is right.

Where the model does not take them together, halves are tried, down to single arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from prunella.graph.guesses import Attempt, attempt
from prunella.graph.values import spelled
from prunella.graph.variants import Variant, Variants
from prunella.model.contained import contained
from prunella.model.state import Steady

_RUNS = 48
"""Most runs of the model."""
_BATCHES = 3
"""Batches over which many arguments are spread."""
Change = tuple[str, Any]
"""The name of an argument, and its value."""


class Trials:
    """Runs of a model with other values of several arguments. base: the arguments of the example, by name."""

    def __init__(self, guard: Steady, base: Mapping[str, Any]) -> None:
        self.guard, self.base, self.left = guard, base, _RUNS
        self._alone: dict[str, Variant] = {}

    def of(self, choices: Mapping[str, Sequence[Any]]) -> Variants:
        """Batches with other arguments that the model takes together. choices: name -> values, the likeliest first.

        Every argument is in one of a few batches: two changes may undo each other, or one may hide the other.
        """
        changes = [(name, values[0]) for name, values in choices.items() if values]
        taken = [self._merged(self._taken(changes[start::_BATCHES], choices)) for start in range(_BATCHES)]
        sets = [some for batch in taken for some in batch]
        known = {name for some in sets for name, _ in some}
        return Variants(tuple(map(self._variant, sets)), tuple(name for name in choices if name not in known))

    def _taken(self, changes: Sequence[Change], choices: Mapping[str, Sequence[Any]]) -> list[list[Change]]:
        """Sets of changes that the model takes."""
        if not changes:
            return []
        tried = self._attempt(changes)
        if tried.accepted:
            return [list(changes)]
        if len(changes) > 1:
            half = len(changes) // 2
            return [*self._taken(changes[:half], choices), *self._taken(changes[half:], choices)]
        (name, _), others = changes[0], choices[changes[0][0]][1:]
        accepted = (value for value in others if not tried.refused and self._attempt([(name, value)]).accepted)
        return [[(name, value)] for value in islice(accepted, 1)]

    def _merged(self, sets: list[list[Change]]) -> list[list[Change]]:
        """Fewer sets, where the model takes several of them together."""
        merged = sets[:1]
        for some in sets[1:]:
            if self._attempt([*merged[0], *some]).accepted:
                merged[0] = [*merged[0], *some]
            else:
                merged.append(some)
        return merged

    def _variant(self, changes: Sequence[Change]) -> Variant:
        alone = {name: Variant((_text((name, value)),), self._batch([(name, value)])) for name, value in changes}
        parts = [self._alone.setdefault(name, variant) for name, variant in alone.items()]
        if len(parts) == 1:
            return parts[0]
        return Variant(tuple(map(_text, changes)), self._batch(changes), tuple(parts))

    def _batch(self, changes: Iterable[Change]) -> dict[str, Any]:
        return {**self.base, **dict(changes)}

    def _attempt(self, changes: Iterable[Change]) -> Attempt:
        self.left -= 1
        if self.left < 0:
            return Attempt(accepted=False)
        with contained():
            return attempt(self.guard, self._batch(changes))


def _text(change: Change) -> str:
    name, value = change
    return f"{name}={spelled(value)}"
