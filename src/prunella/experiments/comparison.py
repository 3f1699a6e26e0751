"""Comparison of pruning methods on one model in one table: all measures over seeds, and seconds."""

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
from prunella.model.user_code import number_of

Method = Callable[[int], nn.Module]
"""Seed -> a pruned model, the same for the same seed."""
Measure = Callable[[nn.Module], float | Sequence[float]]
Measures = Mapping[str | tuple[str, ...], Measure]
"""Name -> function from a model to a number; a tuple of names -> function from a model to as many numbers."""
SECONDS = "seconds"


@dataclass(frozen=True)
class Compared:
    """`values[method][measure]`: one number per seed, in the order of `seeds`; `seconds` (wall) is a measure too."""

    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    seeds: tuple[int, ...]

    def spread(self, method: str, measure: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) over seeds; the deviation of a single seed is not a number."""
        by_seed = self.values[method][measure]
        return mean(by_seed), stdev(by_seed) if len(by_seed) > 1 else math.nan

    def markdown(self) -> str:
        """The comparison as a Markdown table."""
        names = list(next(iter(self.values.values())))
        lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for method in self.values:
            cells = [spread(*self.spread(method, name)) for name in names]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"seeds {', '.join(map(str, self.seeds))}: mean ± standard deviation"])

    def __str__(self) -> str:
        return self.markdown()


def compare(
    dense: nn.Module,
    methods: Mapping[str, Method],
    measures: Measures,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | os.PathLike[str] | None = None,
    asked: object = (),
) -> Compared:
    """Run every method with every seed, and measure the pruned models; the dense model is the first row.

    A method is a function of a seed that returns a pruned model. It draws its calibration data by the seed, so that the
    spread is that of the method. Measures run in evaluation mode without gradients, with every random generator at 0.
    The methods run in turn, seed by seed, so that changes in the speed of the machine affect all of them.

    measures: name -> function of a model, for example perplexity or agreement on text that no method has seen; a tuple
    of names -> a function that returns a number for each.
    folder: of a journal with one record for each number; a stopped comparison is resumed. A changed method or measure
    runs again. asked: all other values on which they depend; the folder is refused for another value, and for another
    dense model. Errors: RequestError for an empty or repeated name.
    seeds: the seeds of every method, each once.
    """
    groups = {(key,) if isinstance(key, str) else key: measure for key, measure in measures.items()}
    names = [name for group in groups for name in group]
    if not methods or not names or not seeds or "dense" in methods or len({SECONDS, *names}) <= len(names):
        why = "a method, a measure and a seed are needed, and the names dense and seconds are reserved"
        raise RequestError("there is nothing to compare", why, "compare(model, {name: function of a seed}, {...})")
    measured = list(groups.items())
    functions = {"dense": (None, measured), **{method: (make, measured) for method, make in methods.items()}}
    marks = {method: digest_of(pair) for method, pair in functions.items()} if folder is not None else {}
    first = {"dense": lambda seed: dense}
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    with open_records(folder, lambda: identify({**model_parts(dense), "question": "compare", "asked": asked})) as known:
        rows = _Rows(dense, groups, known, marks)
        for seed in seeds:
            # the dense model does not depend on the seed: it is measured once
            for method, make in {**(first if seed == seeds[0] else {}), **methods}.items():
                for name, value in rows.row(method, make, seed).items():
                    by_seed = values.setdefault(method, {})
                    by_seed[name] = (*by_seed.get(name, ()), value)
    values["dense"] = {name: by_seed * len(seeds) for name, by_seed in values["dense"].items()}
    return Compared(values, tuple(seeds))


@dataclass(frozen=True)
class _Rows:
    """The measured numbers of one method and seed. marks: method -> digest of its functions, for the journal."""

    dense: nn.Module
    groups: Mapping[tuple[str, ...], Measure]
    known: Records
    marks: Mapping[str, str]

    def row(self, method: str, make: Method, seed: int) -> dict[str, float]:
        """All measures and the seconds, from the journal where they are known."""
        key = f"{method} / {seed} / {self.marks.get(method, '')}"
        if key not in self.known:
            start = now()
            model = make(seed)
            taken = 0.0 if model is self.dense else since(start)
            numbers: dict[str, float] = {}
            for group, measure in self.groups.items():
                numbers.update(zip(group, _measured(model, measure, len(group)), strict=True))
            self.known.add(key, {**numbers, SECONDS: taken})
        return {name: float(value) for name, value in self.known[key].items()}


def _measured(model: nn.Module, measure: Measure, count: int) -> list[float]:
    with untouched(model, 0), mode(model, training=False), torch.no_grad():
        result = measure(model)
    values = [number_of(value, "a measure") for value in (result if isinstance(result, Sequence) else [result])]
    if len(values) != count:
        raise RequestError(f"a measure returned {len(values)} numbers", f"it has {count} names", "name each number")
    return values
