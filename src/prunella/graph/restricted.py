"""Calls that run along an axis of units see only the units that are kept, as in the smaller model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunella.graph.cut.changes import Along
from prunella.model.calls import called


class Restricted(TorchFunctionMode):
    """Restricts the calls in `along` to the kept positions, as in the smaller model."""

    def __init__(self, along: Sequence[Along]) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.at: dict[tuple[str, int], list[Along]] = {}
        for call in along:
            self.at.setdefault((call.name, call.number), []).append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = called(func)
        number, kwargs = self.count[name], kwargs or {}
        self.count[name] += 1
        for call in self.at.get((name, number), ()):
            kept = call.kept.to(args[0].device)
            if name in _CHOICES:
                removed = torch.ones(args[0].shape[call.axis], dtype=torch.bool, device=kept.device)
                removed[kept] = False
                args = (_hidden(args[0], removed, call.axis), *args[1:])
            elif name == "mean":
                args = (args[0].index_select(call.axis, kept), *args[1:])
            else:
                return _normed(func, args, kwargs, kept)
        return func(*args, **kwargs)


_CHOICES = frozenset({"softmax", "topk"})


def _hidden(values: Tensor, removed: Tensor, axis: int) -> Tensor:
    """Values in which removed positions can never be chosen."""
    shape = [-1 if k == axis else 1 for k in range(values.dim())]
    return values.masked_fill(removed.reshape(shape), -torch.inf)


def _normed(func: Any, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """A norm of the last axis over the kept positions; zero elsewhere."""
    names = ("input", "normalized_shape", "weight", "bias", "eps") if called(func) == "layer_norm" else _RMS
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    affine = {k: arguments[k].index_select(0, kept) for k in ("weight", "bias") if arguments.get(k) is not None}
    value = arguments["input"]
    narrow = func(
        value.index_select(-1, kept), (len(kept),), **affine, eps=arguments.get("eps", _EPS.get(called(func)))
    )
    return torch.zeros_like(value).index_copy(-1, kept, narrow)


_RMS = ("input", "normalized_shape", "weight", "eps")
_EPS = {"layer_norm": 1e-5}
