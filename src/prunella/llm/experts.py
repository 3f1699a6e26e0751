"""Weights that stack one matrix per expert of a mixture (MoE): the expert axis, single matrices, and the routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from prunella.graph.data import Graph, Layer

Part = int | None
"""A matrix of a weight: the index of an expert in a stack, None for a weight that is a single matrix."""
_MOST = 1 << 30
"""Bytes of Gram matrices that are accumulated in one pass over the data."""


def matrix_of(weight: Tensor, layer: Layer, part: Part) -> tuple[Tensor, Layer]:
    """One matrix of a weight, as a view, and the layer with its axes; weight and layer as they are for None."""
    if part is None:
        return weight, layer
    axis = expert_axis(weight, layer)
    assert axis is not None  # the weight has experts
    out_axis, in_axis = (a - (a > axis) for a in (layer.out_axis, layer.in_axis))
    return weight.select(axis, part), replace(layer, out_axis=out_axis, in_axis=in_axis)


def expert_axis(weight: Tensor, layer: Layer) -> int | None:
    """The axis of a stacked weight that counts experts; None for a single matrix or a convolution."""
    if layer.op != "linear" or weight.dim() != 3:
        return None
    return next(axis for axis in range(3) if axis not in (layer.out_axis, layer.in_axis))


def expert_chunks(weight: Tensor, layer: Layer) -> Iterator[tuple[Part, ...]]:
    """The experts of a weight, as many at a time as have room for their Gram matrices; (None,) without experts."""
    axis = expert_axis(weight, layer)
    if axis is None:
        yield (None,)
        return
    columns, count = weight.shape[layer.in_axis], weight.shape[axis]
    size = max(1, _MOST // (8 * columns * columns))
    for start in range(0, count, size):
        yield tuple(range(start, min(start + size, count)))


def routers(graph: Graph) -> set[str]:
    """The parameters whose outputs choose experts."""
    members = [m for group in graph.groups if group.kind == "expert" for m in group.members]
    out = {layer.entity: layer.out_axis for layer in graph.layers}
    return {m.entity for m in members if m.role == "out" and out.get(m.entity) == m.axis}


def unread_experts(model: nn.Module, graph: Graph) -> list[str]:
    """Stacked weights that no layer is known to multiply, such as experts that are computed in one batched product."""
    known = {name for layer in graph.layers for name in graph.entities[layer.entity].names}
    return [name for name, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and name not in known]


@contextmanager
def experts_implementation(model: nn.Module, name: Literal["eager", "batched_mm"]) -> Iterator[None]:
    """Inside, models of transformers compute the experts of a mixture in this way.

    eager: one after the other, as layers that can be observed. batched_mm: in one product, whose shapes do not depend
    on values.
    """
    candidates: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in candidates if getattr(config, "_experts_implementation", None)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
