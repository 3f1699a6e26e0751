"""EvoPress: evolutionary search over stored sparsity levels, by an evaluation of the full model."""

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
from prunella.model.user_code import quality_of
from prunella.registry.method import search
from prunella.search.space import Evaluate, SearchResult

Choice = tuple[int, ...]
"""The number of the level of each weight."""


@dataclass(frozen=True)
class Levels:
    """One model pruned to several sparsities; each weight can be taken from any of them.

    models: sparsity -> the model that `solve_` pruned to it; all models have masks on the same weights.
    """

    models: Mapping[float, nn.Module]

    def __post_init__(self) -> None:
        names = [sorted(masks_of(model)) for model in self.models.values()]
        if len(names) < 2 or not names[0] or any(other != names[0] for other in names):
            why = "the same weights must be masked at each of at least two sparsities"
            raise RequestError("these models cannot serve as levels", why, "prune copies of one model with solve_")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities, ascending."""
        return tuple(sorted(self.models))

    def masked(self) -> dict[str, int]:
        """Name -> size of each masked weight."""
        return {name: mask.numel() for name, mask in sorted(masks_of(self.models[self.sparsities[0]]).items())}

    def identity(self) -> Identity:
        """Everything that determines the quality of a choice except the evaluation: every weight of every level."""
        stored = [self.models[s].get_parameter(name) for s, name in product(self.sparsities, self.masked())]
        rest = model_parts(self.models[self.sparsities[0]])
        return identify({**rest, "levels": [*self.sparsities, *self.masked()], "stored weights": digest_of(stored)})

    @torch.no_grad()
    def put_(self, model: nn.Module, choice: Choice) -> None:
        """Copy every masked weight at its chosen level into `model`, with its mask; other weights do not change."""
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
) -> SearchResult:
    """Evolve the sparsity level of each weight, by the quality of the assembled model.

    The search starts at the level `sparsity` for all weights. Each child of the best choice lowers up to three weights
    by one level and raises others, such that at least `sparsity` of all weights is removed. The best of `offspring`
    children replaces its parent if it is better. No choice is evaluated twice.
    Data: the data of `evaluate`; a few thousand tokens that were not used for pruning.

    levels: the stored weights. sparsity: one of their sparsities. evaluate: quality of a model, higher is better.
    generations, offspring: at least 1. folder: of the journal; a stopped search resumes from it with the same result.
    `shares` of the result: weight -> sparsity; `model` is the best model, with its masks.
    Errors: RequestError for a sparsity that is not a level, or numbers out of range.

    Use: single weights of language models above 60 %. Avoid: a sum of layer errors as evaluate: it misleads.
    """
    if sparsity not in levels.models or generations < 1 or offspring < 1:
        sparsities = ", ".join(f"{s:g}" for s in levels.sparsities)
        raise RequestError(
            f"cannot search at {sparsity:g}, {generations} x {offspring}", f"levels are {sparsities}", ""
        )
    question = {"question": "levels", "sparsity": sparsity, "seed": seed, "metric": evaluate}
    with open_records(folder, lambda: levels.identity().plus(question)) as records:
        return _evolved(levels, sparsity, evaluate, (generations, offspring, seed), records)


def _evolved(
    levels: Levels, sparsity: float, evaluate: Evaluate, effort: tuple[int, int, int], records: Records
) -> SearchResult:
    """effort: generations, offspring and seed."""
    generations, offspring, seed = effort
    sizes, rng = levels.masked(), random.Random(seed)
    model = copied(levels.models[levels.sparsities[0]])

    def measured(choice: Choice) -> float:
        levels.put_(model, choice)
        with mode(model, training=False):
            return quality_of(evaluate(model), "evaluate=", "a choice of levels", dense=False)

    def quality(choice: Choice) -> float:
        return records.number(json.dumps(choice), lambda: measured(choice))

    best: Choice = (levels.sparsities.index(sparsity),) * len(sizes)
    ladder = _Ladder(levels.sparsities, tuple(sizes.values()))
    for _ in range(generations):
        children = [ladder.child(best, sparsity, rng) for _ in range(offspring)]
        best = max([best, *children], key=quality)
    levels.put_(model, best)
    shares = {name: levels.sparsities[level] for name, level in zip(sizes, best, strict=True)}
    return SearchResult(shares, quality(best), sum(sizes.values()) - ladder.removed(best), records.added, model)


@dataclass(frozen=True)
class _Ladder:
    """Levels and sizes of the weights, as numbers."""

    sparsities: tuple[float, ...]
    sizes: tuple[int, ...]

    def removed(self, choice: Sequence[int]) -> float:
        """Number of removed weights."""
        return sum(self.sparsities[level] * size for level, size in zip(choice, self.sizes, strict=True))

    def child(self, parent: Choice, sparsity: float, rng: random.Random) -> Choice:
        """The parent with one to three weights a level lower, and others raised until enough weights are removed."""
        child, top = list(parent), len(self.sparsities) - 1
        for _ in range(rng.randint(1, 3)):
            index = rng.randrange(len(child))
            child[index] = max(0, child[index] - 1)
        while self.removed(child) < sparsity * sum(self.sizes) - 1e-6:
            child[rng.choice([k for k, level in enumerate(child) if level < top])] += 1
        return tuple(child)
