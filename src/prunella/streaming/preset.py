"""What `--recipe` means for a language model: a name, and how to prune by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prunella.blockwise import OneShot, one_shot_recipe
from prunella.solvers import admm, sparsegpt

PRESETS: Mapping[str, Callable[..., OneShot]] = {
    "one_shot": one_shot_recipe,
    "admm": partial(OneShot, method=admm),
    "sparsegpt": partial(OneShot, method=sparsegpt),
}
"""Name -> function of (pattern, sparsity)."""
