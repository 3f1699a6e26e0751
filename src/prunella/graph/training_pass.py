"""One forward pass of the smaller model in training mode, tried before the model is returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunella.errors import one_line
from prunella.graph.cut.changes import Changes
from prunella.graph.solve.tokens import known_only, renumber
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.rng import seeded

Shapes = list[tuple[int, ...]]
_SEEDS = (0, 1)


def training_fault(dense: nn.Module, small: nn.Module, done: Changes, inputs: Any) -> str:
    """The fault of the small model in training mode that the dense model does not have; empty if there is none.

    Both run as copies, without gradients, on the same random numbers, and must return tensors of the same shapes.
    The check is skipped if the dense model does not run in training mode on these inputs, for example without targets.
    """
    batch = known_only(inputs, done.renumbered)
    result = _shapes(small, renumber(batch, done.renumbered))
    if isinstance(result, str):
        works = not isinstance(_shapes(dense, batch), str)
        return f"the smaller model does not run in training mode: {result}" if works else ""
    if done.renumbered:  # an output may have an entry per token
        return ""
    expected = _shapes(dense, batch)
    if isinstance(expected, str) or result == expected or expected != _shapes(dense, batch, _SEEDS[1]):
        return ""  # the last: the shapes depend on random numbers
    return f"in training mode the smaller model returns {_listed(result)} instead of {_listed(expected)}"


def _shapes(model: nn.Module, inputs: Any, seed: int = _SEEDS[0]) -> Shapes | str:
    """The shapes of all outputs in training mode, or the error of the model."""
    try:
        with seeded(seed), torch.no_grad():
            return [tuple(tensor.shape) for tensor in outputs_of(copied(model).train(), inputs)]
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # the source of the model may raise anything
        return one_line(error)


def _listed(shapes: Shapes, limit: int = 3) -> str:
    rest = f" and {len(shapes) - limit} more" if len(shapes) > limit else ""
    return (", ".join("x".join(map(str, shape)) or "a number" for shape in shapes[:limit]) or "nothing") + rest
