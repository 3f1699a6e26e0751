"""Conversion between a weight and the matrix `(out, in)` that methods see."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunella.graph.data import Layer
from prunella.types import Weight


def to_matrix(weight: Tensor, layer: Layer) -> Weight:
    """The weight with its output axis first, then input, then kernel axes, flattened to `(out, in * kernel)`."""
    order = [layer.out_axis, layer.in_axis]
    order += [axis for axis in range(weight.dim()) if axis not in order]
    return weight.permute(order).flatten(1)


def kernel_shape(shape: Sequence[int], layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's weight as `(out, in, *kernel)`, for any order of its axes."""
    first = (layer.out_axis, layer.in_axis)
    return tuple(shape[axis] for axis in (*first, *(axis for axis in range(len(shape)) if axis not in first)))


def from_matrix(matrix: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """Undo `to_matrix`: the matrix in the shape and axis order of `weight`."""
    order = [layer.out_axis, layer.in_axis]
    order += [axis for axis in range(weight.dim()) if axis not in order]
    shape = [weight.shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(weight.dim())]
    return matrix.reshape(shape).permute(back).contiguous()
