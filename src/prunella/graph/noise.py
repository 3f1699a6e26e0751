"""Random draws that do not depend on a size, so that a smaller model draws what the larger one draws.

The same seed gives other numbers where a shape differs. Inside `quiet`, dropouts keep everything, every other draw of
real numbers is one number for the whole tensor, and draws of integers are seeded by their place in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.model.calls import called

DROPOUTS = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ "
    "feature_alpha_dropout feature_alpha_dropout_".split()
)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, random draws do not depend on sizes, as the module docstring describes."""
    with _Draws(), _Calls():
        yield


def drops(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a dropout, `(input, p, training)`, that draws a mask."""
    if name not in DROPOUTS or not args or not isinstance(args[0], Tensor):
        return False
    return bool(args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True)))


class _Calls(TorchFunctionMode):
    """Turns dropouts into the identity."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = called(func), dict(kwargs or {})
        if drops(name, args, kwargs):
            return args[0]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the results of random operations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check against the compiler would import dynamo, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.count += 1
        name = func._schema.name.partition("::")[2].removesuffix("_").removesuffix("_like")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None  # it may be another one in a copy
        torch.default_generator.manual_seed(self.count)
        drawn = func(*args, **kwargs)
        value = _VALUES.get(name)
        if value is not None and isinstance(drawn, Tensor) and (drawn.is_floating_point() or drawn.is_complex()):
            numbers = torch.as_tensor(value(self.count, _named(func, args, kwargs)), device=drawn.device)
            drawn.copy_(numbers.expand_as(drawn))
        return drawn


def _named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}, **kwargs}


def _uniform(k: int, given: Mapping[str, Any]) -> float:
    """A number near 0.5: compared with a probability, it gives the more probable outcome."""
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return float(low + (high - low) * (0.5 + 0.03 * math.sin(k)))


def _normal(k: int, given: Mapping[str, Any]) -> Any:
    return given.get("mean", 0.0) + given.get("std", 1.0) * 1.2 * math.cos(k)


def _bernoulli(k: int, given: Mapping[str, Any]) -> Any:
    chance = given.get("p", given.get("self", 1.0))
    return (chance > 0).to(chance.dtype) if isinstance(chance, Tensor) else float(chance > 0)


_VALUES: dict[str, Callable[[int, Mapping[str, Any]], Any]] = {
    "rand": _uniform,
    "uniform": _uniform,
    "randn": _normal,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "exponential": lambda k, given: (1 + 0.3 * math.cos(k)) / given.get("lambd", 1.0),
    "poisson": lambda k, given: given["self"],
    "geometric": lambda k, given: 1.0,
    "log_normal": lambda k, given: 1.0,
    "cauchy": lambda k, given: given.get("median", 0.0) + 0.5,
}
"""Name of a random operation -> the number it draws, as a function of the draw's index and the arguments."""
