"""The layers that can skip zeros, and the shapes of their inputs when an example runs."""

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
"""Numbers of tokens to measure, up to that of the example."""


def eligible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can skip zeros: linear layers, `Conv1D` of transformers, and convolutions of one group."""
    return {name: module for name, module in model.named_modules() if _is_eligible(module)}


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is the linear layer of transformers whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_eligible(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear or is_conv1d(module)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of an eligible layer as `(out, in)`, or `(out, in, h, w)`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of an eligible layer."""
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def geometry_of(module: nn.Conv2d) -> Geometry:
    """The sizes of a convolution."""
    kernel, stride, padding, dilation = (
        (int(pair[0]), int(pair[1])) for pair in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return Geometry(kernel, stride, padding, dilation)


def input_shapes(model: nn.Module, example: Inputs) -> dict[str, set[tuple[int, ...]]]:
    """Eligible layer -> shapes of its inputs when the example runs. Errors: RequestError if the model does not run."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    with _recording(eligible_layers(model), shapes), torch.no_grad():
        try:
            forward(model, example)
        except Exception as error:  # the model may raise anything
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise RequestError(
                "the model does not run on the example", why, "pass an example that the model accepts"
            ) from error
    return shapes


@contextmanager
def _recording(layers: Mapping[str, nn.Module], shapes: dict[str, set[tuple[int, ...]]]) -> Iterator[None]:
    def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            shapes.setdefault(name, set()).add(tuple(args[0].shape))

    handles = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def problems(module: nn.Module, shapes: set[tuple[int, ...]], tokens: Sequence[int]) -> tuple[Problem, ...]:
    """What to measure for a layer: the shapes of its inputs and, for a linear layer, fewer tokens and `tokens`."""
    if isinstance(module, nn.Conv2d):
        geometry = geometry_of(module)
        images = {Problem(s[0] * math.prod(geometry.positions((s[2], s[3]))), s) for s in shapes if len(s) == 4}
        return tuple(sorted((p for p in images if p.size), key=lambda problem: problem.size))
    counts = {math.prod(shape[:-1]) for shape in shapes} - {0}
    fewer = {n for n in BUCKETS if n <= max(counts, default=0)}
    return tuple(Problem(size) for size in sorted(counts | fewer | set(tokens)))
