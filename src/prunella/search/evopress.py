"""An evolution over stored levels of sparsity, judged by the model itself."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.io.identity import Identity, digest_of, identify, model_parts
from prunella.io.journal import Records, open_records
from prunella.model.copying import copied
from prunella.model.masks import masks_of, record_
from prunella.model.state import mode
from prunella.registry.method import search
from prunella.search.space import Evaluate, Found

Choice = tuple[int, ...]
"""For each weight the number of its level."""


@dataclass(frozen=True)
class Levels:
    """One model pruned to several sparsities, from which each weight may be taken apart.

    models: sparsity -> the model at it, as `solve_` leaves it; the same weights are masked in all.
    """

    models: Mapping[float, nn.Module]

    def __post_init__(self) -> None:
        names = [sorted(masks_of(model)) for model in self.models.values()]
        if len(names) < 2 or not names[0] or any(other != names[0] for other in names):
            why = "the same weights must be masked at each of at least two sparsities"
            raise RequestError("these models are no levels", why, "prune copies of one model with solve_")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """From the least."""
        return tuple(sorted(self.models))

    def masked(self) -> dict[str, int]:
        """The weights that are masked, and their sizes."""
        return {name: mask.numel() for name, mask in sorted(masks_of(self.models[self.sparsities[0]]).items())}

    def identity(self) -> Identity:
        """What decides the quality of a choice, but for the function that says it: every weight of every level."""
        stored = [self.models[s].get_parameter(name) for s, name in product(self.sparsities, self.masked())]
        rest = model_parts(self.models[self.sparsities[0]])
        return identify({**rest, "levels": [*self.sparsities, *self.masked()], "stored weights": digest_of(stored)})

    @torch.no_grad()
    def put_(self, model: nn.Module, choice: Choice) -> None:
        """Give `model` every masked weight at its level, with the mask; all else as at the lowest level."""
        masks = {}
        for name, level in zip(self.masked(), choice, strict=True):
            source, parameter = self.models[self.sparsities[level]], model.get_parameter(name)
            parameter.copy_(source.get_parameter(name))
            masks[parameter] = masks_of(source)[name]
        record_(model, masks)


@search(source="Sieberling et al. 2024, arXiv:2410.14649 (EvoPress)")
def evolve_levels(
    levels: Levels,
    sparsity: float,
    evaluate: Evaluate,
    *,
    generations: int = 20,
    offspring: int = 8,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Found:
    """Evolve which weight takes which level, by what `evaluate` says of the model put together.

    It begins at the level `sparsity` everywhere. Each child of the best so far has up to three weights a level
    lower and others higher, such that at least `sparsity` of all weights goes; the best of `offspring` children
    replaces its parent if it is better. What was evaluated once is not evaluated again.
    Data: what `evaluate` needs; a few thousand tokens that were not used to prune.

    levels: the stored weights. sparsity: one of theirs. evaluate: quality of a model, higher is better. generations,
    offspring: at least 1. folder: for the journal, from which a search that was stopped goes on to the same result.
    `shares` of the result: weight -> sparsity; `model` is the best model, with its masks.

    Use: single weights of language models above 60 %. Avoid: a sum of layer errors as evaluate: it misleads.
    """
    if sparsity not in levels.models or generations < 1 or offspring < 1:
        known = ", ".join(f"{s:g}" for s in levels.sparsities)
        raise RequestError(f"cannot search at {sparsity:g}, {generations} x {offspring}", f"levels are {known}", "")
    asked = {"question": "levels", "sparsity": sparsity, "seed": seed, "metric": evaluate}
    with open_records(folder, lambda: levels.identity().plus(asked)) as records:
        return _evolved(levels, sparsity, evaluate, (generations, offspring, seed), records)


def _evolved(
    levels: Levels, sparsity: float, evaluate: Evaluate, effort: tuple[int, int, int], records: Records
) -> Found:
    """effort: generations, offspring and seed."""
    generations, offspring, seed = effort
    sizes, rng = levels.masked(), random.Random(seed)
    model = copied(levels.models[levels.sparsities[0]])

    def measured(choice: Choice) -> float:
        levels.put_(model, choice)
        with mode(model, training=False):
            return float(evaluate(model))

    def quality(choice: Choice) -> float:
        return records.number(json.dumps(choice), lambda: measured(choice))

    best: Choice = (levels.sparsities.index(sparsity),) * len(sizes)
    ladder = _Ladder(levels.sparsities, tuple(sizes.values()))
    for _ in range(generations):
        children = [ladder.child(best, sparsity, rng) for _ in range(offspring)]
        best = max([best, *children], key=quality)
    levels.put_(model, best)
    shares = {name: levels.sparsities[level] for name, level in zip(sizes, best, strict=True)}
    return Found(shares, quality(best), sum(sizes.values()) - ladder.removed(best), records.added, model)


@dataclass(frozen=True)
class _Ladder:
    """Levels and sizes of the weights, as numbers."""

    sparsities: tuple[float, ...]
    sizes: tuple[int, ...]

    def removed(self, choice: Sequence[int]) -> float:
        """Over all weights."""
        return sum(self.sparsities[level] * size for level, size in zip(choice, self.sizes, strict=True))

    def child(self, parent: Choice, sparsity: float, rng: random.Random) -> Choice:
        """The parent with one to three weights a level lower, then others raised until enough is removed again."""
        child, top = list(parent), len(self.sparsities) - 1
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(child))
            child[place] = max(0, child[place] - 1)
        while self.removed(child) < sparsity * sum(self.sizes) - 1e-6:
            child[rng.choice([k for k, level in enumerate(child) if level < top])] += 1
        return tuple(child)
