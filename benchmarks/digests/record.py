"""Records what `digests.py` compares: every cell in turn, seeded, on one thread."""

from __future__ import annotations

import logging
import platform
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import commands  # noqa: F401 (adds cells)
import language  # noqa: F401
import methods  # noqa: F401
import numpy as np
import torch
import training  # noqa: F401
import transformers
from cells import METHODS, Cell
from plans import model_cells
from value import digest

import prunella as pr

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "optuna", "torchao", "safetensors", "numpy", "scipy")
Record = dict[str, str]


def cells() -> Iterable[Cell]:
    """All of them, in order."""
    return chain(METHODS, model_cells())


def parts_of(cell: Cell) -> Record:
    """The digests of one cell by name, or the class of the error that it ends in."""
    seed(0)
    try:
        made = cell.make()
        parts = made if isinstance(made, Mapping) else {"value": made}
        return {f"{cell.name} / {name}": digest(part) for name, part in parts.items()}
    except pr.PruningError as error:
        return {cell.name: f"error {type(error).__name__}"}
    except Exception as error:
        traceback.print_exc()
        return {cell.name: f"failed {type(error).__name__}"}


def seed(number: int) -> None:
    """Seed every generator, so that a cell does not depend on those before it."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def record(pattern: str) -> Record:
    """The digests of all cells whose name matches."""
    found: Record = {}
    spent: list[tuple[float, str]] = []
    print(f"results of {Path(pr.__file__).parent}", file=sys.stderr)
    for cell in cells():
        if fnmatchcase(cell.name, pattern):
            start = time.perf_counter()
            found |= parts_of(cell)
            spent.append((time.perf_counter() - start, cell.name))
    slowest = [f"{seconds:6.1f} s  {name}" for seconds, name in sorted(spent, reverse=True)[:5]]
    print(f"{len(spent)} cells, {len(found)} digests, the slowest:", *slowest, sep="\n", file=sys.stderr)
    return found


def environment() -> dict[str, str]:
    """What else the digests depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def prepare() -> None:
    """One thread, and no words of other libraries."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
