"""The layers whose zeros could be skipped, and what they meet when an example runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.forward import forward
from prunella.runtime.tuning.choice import Geometry, Problem
from prunella.types import Inputs

BUCKETS = (1, 2, 4, 8, *(8 * 4**k for k in range(1, 10)))


def targets(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that could skip zeros: linear ones, those of GPT-2, and convolutions of one group."""
    return {name: module for name, module in model.named_modules() if _fits(module)}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers that keeps its weight transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _fits(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear or is_conv1d(module)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a target as `(out, in)`, or `(out, in, h, w)`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a target."""
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def geometry_of(module: nn.Conv2d) -> Geometry:
    """The sizes of a convolution."""
    kernel, stride, padding, dilation = (
        (int(pair[0]), int(pair[1])) for pair in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return Geometry(kernel, stride, padding, dilation)


def sizes(model: nn.Module, example: Inputs) -> dict[str, set[tuple[int, ...]]]:
    """Layer -> shapes of its inputs when the example runs."""
    met: dict[str, set[tuple[int, ...]]] = {}
    with _noting(targets(model), met), torch.no_grad():
        try:
            forward(model, example)
        except Exception as error:  # whatever the user's model raises
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise RequestError("the model does not run on the example", why, "give one that it takes") from error
    return met


@contextmanager
def _noting(layers: Mapping[str, nn.Module], met: dict[str, set[tuple[int, ...]]]) -> Iterator[None]:
    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            met.setdefault(name, set()).add(tuple(args[0].shape))

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def problems(module: nn.Module, shapes: set[tuple[int, ...]], tokens: Sequence[int]) -> tuple[Problem, ...]:
    """What to measure for a layer: the shapes that it met and, if linear, fewer tokens and more."""
    if isinstance(module, nn.Conv2d):
        geometry = geometry_of(module)
        made = {Problem(s[0] * math.prod(geometry.positions((s[2], s[3]))), s) for s in shapes if len(s) == 4}
        return tuple(sorted((p for p in made if p.size), key=lambda problem: problem.size))
    met = {math.prod(shape[:-1]) for shape in shapes} - {0}
    powers = {n for n in BUCKETS if n <= max(met, default=0)}
    return tuple(Problem(size) for size in sorted(met | powers | set(tokens)))
