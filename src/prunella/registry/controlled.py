"""Criteria under a control."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunella.errors import RequestError

Criterion = Callable[..., Tensor]


@dataclass(frozen=True)
class Controlled:
    """A criterion whose finished scores a control changes. Statistics and knobs are those of the criterion.

    control: the function that returned this object. of: the criterion.
    change: (scores of one layer or group, generator) -> scores.
    """

    control: Callable[[Criterion], Controlled]
    of: Criterion
    change: Callable[[Tensor, torch.Generator], Tensor]
    __signature__: inspect.Signature = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        criterion: object = self.of
        if not callable(criterion):
            name = getattr(self.control, "__name__", "a control")
            raise RequestError(
                f"{name} takes a criterion, not {type(criterion).__name__}", "", f"for example {name}(magnitude)"
            )
        object.__setattr__(self, "__signature__", inspect.signature(self.of))

    def __call__(self, *statistics: Tensor) -> Tensor:
        """The changed scores of one layer. For units, a recipe changes the reduced scores instead."""
        return self.change(self.of(*statistics), torch.Generator().manual_seed(0))


def plain_function(function: Any) -> Any:
    """The function under any `functools.partial`."""
    while isinstance(function, partial):
        function = function.func
    return function


def name_of(function: Any) -> str:
    """A function's or class's name as users write it, without the underscore that avoids a builtin."""
    if isinstance(function, Controlled):
        return f"{name_of(function.control)}({name_of(function.of)})"
    return str(getattr(plain_function(function), "__name__", repr(function))).rstrip("_")
