"""What `--recipe` means for a language model: a name, and how to prune by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prunella.criteria import ria, wanda
from prunella.granularity import Element
from prunella.llm import OneShot, one_shot_recipe
from prunella.solvers import admm, alps, by_score, sparsegpt
from prunella.solvers.layer import Pattern
from prunella.types import InputNorm, Saliency, Weight


def _magnitude(weight: Weight, norm: InputNorm) -> Saliency:
    return weight.abs()


def _by_rows(score: Callable[[Weight, InputNorm], Saliency], pattern: Pattern, sparsity: float) -> OneShot:
    """Single weights compete within their row, and a block is scored as a whole, as in the papers of these scores."""
    rows = Element(per_row=True) if isinstance(pattern, Element) else pattern
    return OneShot(rows, sparsity, partial(by_score, score=score), true_sequential=False)


PRESETS: Mapping[str, Callable[..., OneShot]] = {
    "one_shot": one_shot_recipe,
    "admm": partial(OneShot, method=admm),
    "alps": partial(OneShot, method=alps),
    "sparsegpt": partial(OneShot, method=sparsegpt),
    "wanda": partial(_by_rows, wanda),
    "ria": partial(_by_rows, ria),
    "magnitude": lambda pattern, sparsity: OneShot(pattern, sparsity, partial(by_score, score=_magnitude)),
}
"""Name -> function of (pattern, sparsity). Magnitudes compete over the whole matrix."""
