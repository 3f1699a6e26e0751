"""Weights of several matrices, one per expert of a mixture (MoE) or per group of a convolution; and the routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunella.graph.data import Graph, Layer
from prunella.graph.matrix import to_matrix
from prunella.model.observed_reads import Read, View

Part = int | View | None
"""A matrix of a weight: the index of an expert or of a group of a convolution; some rows or columns; None for all."""
_MOST = 1 << 30
"""Bytes of Gram matrices that are accumulated in one pass over the data."""


def matrix_of(weight: Tensor, layer: Layer, part: Part) -> tuple[Tensor, Layer]:
    """One matrix of a weight, as a view, and the layer with its axes; weight and layer as they are for None."""
    if part is None:
        return weight, layer
    if isinstance(part, View):
        return part.of(weight), layer
    axis = expert_axis(weight, layer)
    if axis is None:
        size = weight.shape[0] // layer.groups
        return weight.narrow(0, part * size, size), layer
    out_axis, in_axis = (a - (a > axis) for a in (layer.out_axis, layer.in_axis))
    return weight.select(axis, part), replace(layer, out_axis=out_axis, in_axis=in_axis)


def expert_axis(weight: Tensor, layer: Layer) -> int | None:
    """The axis of a stacked weight that counts experts; None for a single matrix or a convolution."""
    if layer.op != "linear" or weight.dim() != 3:
        return None
    return next(axis for axis in range(3) if axis not in (layer.out_axis, layer.in_axis))


def expert_chunks(weight: Tensor, layer: Layer) -> Iterator[tuple[Part, ...]]:
    """The matrices of a weight, as many at a time as have room for their Gram matrices; (None,) for a single one."""
    axis = expert_axis(weight, layer)
    count = layer.groups if axis is None else weight.shape[axis]
    if axis is None and count == 1:
        yield (None,)
        return
    columns = to_matrix(*matrix_of(weight, layer, 0)).shape[1]
    size = max(1, _MOST // (8 * columns * columns))
    for start in range(0, count, size):
        yield tuple(range(start, min(start + size, count)))


def parts_read(read: Read, layer: Layer) -> dict[Part, int]:
    """The parts of a weight that a call reads, each with the number of its matrix in the call; none if others."""
    if read.part is not None:
        parts: dict[Part, int] = {read.part: 0}
    elif read.full and (layer.groups > 1 or expert_axis(read.weight, layer) is not None):
        parts = {number: number for number in range(read.groups)}
    elif read.full:
        parts = {None: 0}
    else:
        parts = {part: 0 for part in [_slice(read, layer)] if part is not None}
    agree = all(_agree(read, number, to_matrix(*matrix_of(read.weight, layer, p))) for p, number in parts.items())
    return parts if agree else {}


def _slice(read: Read, layer: Layer) -> View | None:
    """Some rows, or some columns, of a matrix, as a view with the axes of the weight."""
    matrix = read.matrices()
    if read.weight.dim() != 2 or len(matrix) != 1 or read.view.offset + matrix.numel() > read.weight.numel():
        return None
    first, second = (1, 2) if layer.out_axis == 0 else (2, 1)
    size, stride = matrix.shape, matrix.stride()
    return View((size[first], size[second]), (stride[first], stride[second]), read.view.offset)


def _agree(read: Read, number: int, matrix: Tensor) -> bool:
    """Whether a call reads a matrix as it is pruned."""
    if read.form.sizes(read.view.size)[1:] != matrix.shape or number >= read.groups:
        return False
    mine = read.matrices()[number]
    steps = zip(mine.shape, mine.stride(), matrix.stride(), strict=True)
    if mine.data_ptr() == matrix.data_ptr() and all(size == 1 or a == b for size, a, b in steps):
        return True
    # one of them is a copy
    return mine.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr() and torch.equal(mine, matrix)


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
def experts_implementation(model: nn.Module, name: Literal["eager", "batched_mm", "grouped_mm"]) -> Iterator[None]:
    """Inside, models of transformers compute the experts of a mixture in this way.

    eager: one after the other, as layers that can be observed. batched_mm: in one product, whose shapes do not depend
    on values. grouped_mm: in one product of tokens in the order of their experts, with such shapes too.
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
