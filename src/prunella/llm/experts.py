"""Weights that are stacks of matrices, one for each expert of a mixture: their axis, and what routes to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from prunella.graph.data import Graph, Layer

_MOST = 1 << 30
"""Bytes of Gram matrices that are summed in one pass over the data."""


def matrix_of(weight: Tensor, layer: Layer, part: int | None) -> tuple[Tensor, Layer]:
    """One matrix of a stack, as a view, and its axes; for `part` None the weight and layer as they are."""
    if part is None:
        return weight, layer
    axis = stack_axis(weight, layer)
    assert axis is not None  # a part is of a stack
    out, wide = (a - (a > axis) for a in (layer.out_axis, layer.in_axis))
    return weight.select(axis, part), replace(layer, out_axis=out, in_axis=wide)


def stack_axis(weight: Tensor, layer: Layer) -> int | None:
    """The axis that counts the matrices of a stack, None for a single matrix or a convolution."""
    if layer.op != "linear" or weight.dim() != 3:
        return None
    return next(axis for axis in range(3) if axis not in (layer.out_axis, layer.in_axis))


def in_turns(weight: Tensor, layer: Layer) -> Iterator[tuple[int | None, ...]]:
    """The parts of a weight, as many at a time as there is memory for their Gram matrices; a plain one has None."""
    axis = stack_axis(weight, layer)
    if axis is None:
        yield (None,)
        return
    wide, count = weight.shape[layer.in_axis], weight.shape[axis]
    each = max(1, _MOST // (8 * wide * wide))
    for start in range(0, count, each):
        yield tuple(range(start, min(start + each, count)))


def routers(graph: Graph) -> set[str]:
    """The parameters whose outputs choose experts."""
    members = [m for group in graph.groups if group.kind == "expert" for m in group.members]
    out = {layer.entity: layer.out_axis for layer in graph.layers}
    return {m.entity for m in members if m.role == "out" and out.get(m.entity) == m.axis}


def unread_stacks(model: nn.Module, graph: Graph) -> list[str]:
    """Parameters of three axes that no layer is known to multiply with, such as experts that run in one product."""
    known = {name for layer in graph.layers for name in graph.entities[layer.entity].names}
    return [name for name, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and name not in known]


@contextmanager
def experts_run(model: nn.Module, how: Literal["eager", "batched_mm"]) -> Iterator[None]:
    """Inside, models of transformers run the experts of a mixture in one way.

    eager: one after the other, as layers that can be seen. batched_mm: in one product, whose shapes depend on no value.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "_experts_implementation", None)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = how
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
