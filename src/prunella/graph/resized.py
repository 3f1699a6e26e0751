"""Batches of other sizes, axes and memory layouts, made from the values of an example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunella.model.trees import each, tensors

_FEW = 8
"""Axes with fewer positions are made longer, the others shorter: the check then costs no more than the first one."""
_LARGEST = 1 << 18
"""Most elements of an input that is made to reach a branch of the source; or four times those of the example."""


def _spatial(main: Tensor) -> Iterator[frozenset[int]]:
    """Sets of sizes that may be those of an image or a sequence: of the axes behind the channels, or before them."""
    shape = tuple(main.shape)
    yield from dict.fromkeys(frozenset(axes) for axes in (shape[2:], shape[1:-1], shape[1:2]) if axes)


def resized(inputs: Any, main: Tensor) -> Iterator[Any]:
    """The inputs with the sizes of an image or a sequence halved, or doubled if they are small or cannot be halved."""
    for sizes in _spatial(main):
        for factor in (_halved, _doubled) if min(sizes) >= _FEW else (_doubled, _halved):
            new = {size: factor(size) for size in sizes}
            if all(size > 0 for size in new.values()):
                yield positions(inputs, new)


def _halved(size: int) -> int:
    return size // 2


def _doubled(size: int) -> int:
    return 2 * size


def turned(inputs: Any, main: Tensor, size: int, other: int) -> Iterator[Any]:
    """The inputs with `other` as the size that decides a branch: the batch, or axes of which it is a fraction."""
    room = max(_LARGEST, 4 * main.numel())
    if main.shape[0] == size and main.numel() // size * other <= room:
        yield samples(inputs, size, other)
    single = [frozenset([n]) for n in sorted(set(main.shape[1:]))]
    whole = [*single, frozenset(main.shape[2:]), frozenset(main.shape[1:])]
    for lengths in dict.fromkeys(whole):
        new = {n: n // size * other for n in lengths if n % size == 0}
        if new and math.prod(new.get(n, n) for n in main.shape[1:]) * main.shape[0] <= room:
            yield positions(inputs, new)


def stretched(inputs: Any, main: Tensor, axes: frozenset[int], new: int) -> Iterator[Any]:
    """The inputs with size `new` on these axes of the main one; none if that would be too large."""
    size = main.shape[min(axes)]
    if main.numel() * (new / size) ** len(axes) > max(_LARGEST, 4 * main.numel()):
        return
    if axes == {0}:
        yield samples(inputs, size, new)
        return

    def change(tensor: Tensor) -> Tensor:
        for axis in axes:
            if tensor.dim() == main.dim() and tensor.shape[axis] == size:
                tensor = tensor.index_select(axis, torch.arange(new, device=tensor.device) % size)
        return tensor

    yield each(_plain(inputs), change)


def samples(inputs: Any, count: int, new: int) -> Any:
    """The inputs with `new` samples in place of `count`; further samples are the first ones, with positions shifted."""

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count:
            return tensor
        copies = [tensor]
        while sum(len(copy) for copy in copies) < new:
            copies.append(_shifted(tensor, len(copies)))
        return torch.cat(copies)[:new].contiguous()

    return each(_plain(inputs), change)


def positions(inputs: Any, sizes: Mapping[int, int]) -> Any:
    """The inputs with axes of these sizes, other than the first, cut or continued with their own positions."""

    def change(tensor: Tensor) -> Tensor:
        behind = tensor.is_floating_point() and any(size in sizes for size in tensor.shape[2:])
        for axis in range(2 if behind else 1, tensor.dim()):  # channels may have the size of an image by chance
            size = tensor.shape[axis]
            if size in sizes:
                tensor = tensor.index_select(axis, torch.arange(sizes[size], device=tensor.device) % size)
        return tensor

    return each(_plain(inputs), change)


def shape_text(inputs: Any) -> str:
    """`2x3x4x4, 2x5`."""
    return ", ".join("x".join(map(str, tensor.shape)) or "a number" for tensor in tensors(inputs))


def batch_text(batch: Any, inputs: Any) -> str:
    """`an input of 2x3x4x4`, and its strides where the example has the same shape in another memory layout."""
    text, same = shape_text(batch), shape_text(batch) == shape_text(inputs) and layout(batch) != layout(inputs)
    strides = ", ".join("x".join(map(str, steps)) for steps in layout(batch))
    return f"an input of {text} with strides {strides}" if same else f"an input of {text}"


def _shifted(tensor: Tensor, steps: int) -> Tensor:
    return tensor.roll(steps, -1) if tensor.dim() > 1 else tensor


def _plain(inputs: Any) -> Any:
    """The inputs without gradients, so that autograd records nothing."""
    return each(inputs, lambda tensor: tensor.detach())


# -- axes and layouts ----------------------------------------------------------------------------------------------


def of_other_rank(inputs: Any, main: Tensor) -> Iterator[Any]:
    """The inputs without their first axis or without their second one, and with one more axis at either place."""
    for axis in (0, 1):
        if main.dim() > max(axis, 1):
            yield each(_plain(inputs), partial(_without_axis, main=main, axis=axis))
    for axis in (0, 1):
        yield each(_plain(inputs), partial(_with_axis, main=main, axis=axis))


def _without_axis(tensor: Tensor, main: Tensor, axis: int) -> Tensor:
    return tensor.select(axis, 0).clone() if _alike(tensor, main, axis) else tensor


def _with_axis(tensor: Tensor, main: Tensor, axis: int) -> Tensor:
    return torch.stack([tensor, _shifted(tensor, 1)], axis) if _alike(tensor, main, axis) else tensor


def _alike(tensor: Tensor, main: Tensor, axis: int) -> bool:
    """Whether a tensor has the axes of the main one up to this one: it loses or gains an axis with it."""
    return tensor.dim() > axis and tensor.shape[: axis + 1] == main.shape[: axis + 1]


def of_other_layout(inputs: Any) -> Iterator[Any]:
    """The inputs with the same values in another memory layout: channels last, and reversed axes."""
    for change in (_channels_last, _reversed_axes):
        changed = each(_plain(inputs), change)
        if layout(changed) != layout(inputs):
            yield changed


def layout(inputs: Any) -> tuple[tuple[int, ...], ...]:
    """The strides of every tensor."""
    return tuple(tuple(t.stride()) for t in tensors(inputs) if t.layout is torch.strided)


def _channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


def _reversed_axes(tensor: Tensor) -> Tensor:
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)
