"""Several ways to prune one model in one table: every measure, over seeds, with the seconds that each way took."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.io.identity import digest_of, identify, model_parts
from prunella.io.journal import Records, open_records
from prunella.measure.clock import now, since
from prunella.measure.text import spread
from prunella.model.state import mode, untouched

Way = Callable[[int], nn.Module]
"""Seed -> a pruned model, the same for the same seed."""
Measure = Callable[[nn.Module], float | Sequence[float]]
Measures = Mapping[str | tuple[str, ...], Measure]
"""Name -> function of a model that gives a number; a tuple of names -> one that gives as many."""
SECONDS = "seconds"


@dataclass(frozen=True)
class Compared:
    """`values[way][measure]`: one number a seed, in the order of `seeds`; `seconds` (wall) is a measure of each way."""

    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    seeds: tuple[int, ...]

    def spread(self, way: str, measure: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) over seeds; the deviation of a single seed is not a number."""
        found = self.values[way][measure]
        return mean(found), stdev(found) if len(found) > 1 else math.nan

    def markdown(self) -> str:
        """As a table."""
        names = list(next(iter(self.values.values())))
        lines = [f"| way | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for way in self.values:
            cells = [spread(*self.spread(way, name)) for name in names]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"seeds {', '.join(map(str, self.seeds))}: mean ± standard deviation"])

    def __str__(self) -> str:
        return self.markdown()


def compare(
    dense: nn.Module,
    ways: Mapping[str, Way],
    measures: Measures,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | os.PathLike[str] | None = None,
    asked: object = (),
) -> Compared:
    """Run every way with every seed, and measure what comes out; the dense model is the first row.

    A way is a function of a seed that returns a pruned model: it draws its calibration data by the seed, so that the
    spread is that of the method. Measures run in eval mode without gradients, with every random generator at 0. The
    ways are run in turn, seed by seed, so that a slow hour of the machine meets all of them.

    measures: name -> function of a model, for example perplexity or agreement on text that no way has seen; a tuple of
    names -> a function that gives a number for each.
    folder: of a journal, one record for each number, so that a comparison that was stopped goes on. A way or a measure
    that has changed is run again. What they depend on beyond their own code and arguments is passed as `asked`; the
    folder is refused for any other, and for another dense model. Errors: RequestError for an empty or repeated name.
    """
    groups = {(key,) if isinstance(key, str) else key: measure for key, measure in measures.items()}
    names = [name for group in groups for name in group]
    if not ways or not names or not seeds or "dense" in ways or len({SECONDS, *names}) <= len(names):
        why = "a way, a measure and a seed are needed, and dense and seconds are names of its own"
        raise RequestError("there is nothing to compare", why, "compare(model, {name: function of a seed}, {...})")
    judged = list(groups.items())
    functions = {"dense": (None, judged), **{way: (make, judged) for way, make in ways.items()}}
    marks = {way: digest_of(pair) for way, pair in functions.items()} if folder is not None else {}
    first = {"dense": lambda seed: dense}
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    with open_records(folder, lambda: identify({**model_parts(dense), "question": "compare", "asked": asked})) as known:
        rows = _Rows(dense, groups, known, marks)
        for seed in seeds:
            # no seed moves the dense model: it is measured once
            for way, make in {**(first if seed == seeds[0] else {}), **ways}.items():
                for name, value in rows.row(way, make, seed).items():
                    by_seed = values.setdefault(way, {})
                    by_seed[name] = (*by_seed.get(name, ()), value)
    values["dense"] = {name: found * len(seeds) for name, found in values["dense"].items()}
    return Compared(values, tuple(seeds))


@dataclass(frozen=True)
class _Rows:
    """What is measured of one way with one seed. marks: way -> digest of its functions, for the journal."""

    dense: nn.Module
    groups: Mapping[tuple[str, ...], Measure]
    known: Records
    marks: Mapping[str, str]

    def row(self, way: str, make: Way, seed: int) -> dict[str, float]:
        """Every measure, and the seconds; what is known is not run again."""
        key = f"{way} / {seed} / {self.marks.get(way, '')}"
        if key not in self.known:
            start = now()
            model = make(seed)
            taken = 0.0 if model is self.dense else since(start)
            found: dict[str, float] = {}
            for group, measure in self.groups.items():
                found.update(zip(group, _measured(model, measure, len(group)), strict=True))
            self.known.add(key, {**found, SECONDS: taken})
        return {name: float(value) for name, value in self.known[key].items()}


def _measured(model: nn.Module, measure: Measure, count: int) -> list[float]:
    with untouched(model, 0), mode(model, training=False), torch.no_grad():
        found = measure(model)
    values = [float(value) for value in found] if isinstance(found, Sequence) else [float(found)]
    if len(values) != count:
        raise RequestError(f"a measure gave {len(values)} numbers", f"it has {count} names", "give each number a name")
    return values
