"""What a model's source asks beside its tensors: whether gradients are recorded, or Python for a random number."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from prunella.graph.trace.source import LIBRARY, reader
from prunella.model.beside import beside

Answered = Callable[[str, Any], Any]
"""(name of the query, its answer) -> the answer that the source gets."""
_OF_TORCH = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
_QUERIES: tuple[tuple[Any, str], ...] = (
    *((torch, name) for name in _OF_TORCH),
    *((random, name) for name in ("random", "uniform", "randint", "randrange", "gauss")),
    *((np.random, name) for name in ("rand", "random", "uniform", "randint", "randn", "normal")),
)


@contextmanager
def queries_answered(answered: Answered, model: nn.Module | None) -> Iterator[None]:
    """Inside, `answered` answers these queries. model: its files may have imported them by name."""
    replaced: list[tuple[Any, str, Any]] = []
    files = [] if model is None else [holder for holder in beside(model) if isinstance(holder, ModuleType)]
    for owner, query in _QUERIES:
        function = getattr(owner, query)
        around = _around(function, query, answered)
        places = [(owner, query), *((file, name) for file in files for name in _names_of(function, file))]
        for place, name in places:
            replaced.append((place, name, function))
            setattr(place, name, around)
    try:
        yield
    finally:
        for place, name, function in replaced:
            setattr(place, name, function)


def _names_of(function: Any, file: ModuleType) -> list[str]:
    return [name for name, value in vars(file).copy().items() if value is function]


def _around(function: Callable[..., Any], query: str, answered: Answered) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def ask(*args: Any, **kwargs: Any) -> Any:
        return answered(query, function(*args, **kwargs))

    return ask


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Inside, the source is told that gradients are recorded, as they are in training.

    torch itself is not: its guards, such as `no_grad`, would then leave gradients on.
    """

    def answered(query: str, answer: Any) -> Any:
        return answer if asked_by(sys._getframe(2)) is None else query == "is_grad_enabled" or answer

    with queries_answered(answered, model):
        yield


def asked_by(frame: FrameType) -> FrameType | None:
    """The frame of the model's source that asks; None if torch or this package does."""
    return None if frame.f_code.co_filename.startswith(LIBRARY) else reader(frame)
