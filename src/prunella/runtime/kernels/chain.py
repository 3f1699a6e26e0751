"""A chain of convolutions in one call of the kernels.

Intermediate results share one buffer: a part of it is used again as soon as nothing reads it any more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prunella.runtime.kernels import library, signatures
from prunella.runtime.kernels.config import ACTIVATION_CODES, Activation
from prunella.runtime.kernels.convolution import Patches
from prunella.runtime.kernels.library import PackedWeight

_LINE = 16
"""Floats of a cache line. Every part of the buffer begins with one."""


@dataclass(frozen=True)
class ChainStep:
    """The inputs of a layer as places: the inputs come first, then the result of each layer.

    free: places that no later layer reads.
    """

    x: int
    residual: int | None
    free: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ready:
    """A layer prepared for images of one size."""

    packed: PackedWeight
    patches: Patches
    bias: Tensor | None
    activation: Activation


@dataclass(frozen=True)
class Prepared:
    """A chain as the kernels take it. floats: size of the buffer. outputs: sizes of the results that are returned.

    layers: keeps alive the memory that `steps` points to.
    """

    steps: Any = field(repr=False)
    floats: int
    outputs: tuple[Patches, ...]
    layers: tuple[Ready, ...] = field(repr=False)


class _Buffer:
    """Allocates parts of one buffer, in whole cache lines."""

    def __init__(self) -> None:
        self.end = 0
        self.holes: list[tuple[int, int]] = []  # size, beginning

    def allocate(self, floats: int) -> int:
        size = _lines(floats)
        fitting = min((hole for hole in self.holes if hole[0] >= size), default=None)
        if fitting is None:
            self.end += size
            return self.end - size
        self.holes.remove(fitting)
        if fitting[0] > size:
            self.holes.append((fitting[0] - size, fitting[1] + size))
        return fitting[1]

    def release(self, floats: int, begin: int) -> None:
        size = _lines(floats)
        for hole in list(self.holes):
            if hole[1] + hole[0] == begin or begin + size == hole[1]:
                self.holes.remove(hole)
                begin, size = min(begin, hole[1]), size + hole[0]
        self.holes.append((size, begin))


def _lines(floats: int) -> int:
    return -(-floats // _LINE) * _LINE


def allocate(
    steps: Sequence[ChainStep], sizes: Sequence[int], inputs: int, outputs: Sequence[int]
) -> tuple[dict[int, int], int]:
    """Place -> first float in the buffer, for every result that is not returned; and the size of the buffer.

    sizes: floats of each result. outputs: places of the results that are returned. A result overwrites the residual
    that is added to it if nothing else reads the residual: each number is read before it is replaced.
    """
    buffer, at = _Buffer(), dict[int, int]()
    for number, step in enumerate(steps):
        y, free = inputs + number, [place for place in step.free if place in at]
        if y not in outputs:
            if step.residual in free and step.residual != step.x:
                free.remove(step.residual)
                at[y] = at[step.residual]
            else:
                at[y] = buffer.allocate(sizes[number])
        for place in free:
            buffer.release(sizes[place - inputs], at[place])
    return at, buffer.end


def prepare(steps: Sequence[ChainStep], layers: Sequence[Ready], inputs: int, outputs: Sequence[int]) -> Prepared:
    """A chain for one size of the inputs. inputs: how many; outputs: places of the results that are returned."""
    at, floats = allocate(steps, [_floats(layer.patches) for layer in layers], inputs, outputs)

    def locate(place: int | None) -> tuple[int, int]:
        """Number of the tensor (inputs, the buffer, outputs), and the first float in it."""
        if place is None:
            return -1, 0
        if place in at:
            return inputs, at[place]
        return place if place < inputs else inputs + 1 + outputs.index(place), 0

    array = (signatures.Step * len(steps))()
    for number, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        tensors, offsets = zip(*map(locate, (step.x, step.residual, inputs + number)), strict=True)
        image = ctypes.cast(layer.patches.image, ctypes.c_void_p)
        bias = None if layer.bias is None else layer.bias.data_ptr()
        options = ACTIVATION_CODES[layer.activation], layer.packed.config.tile
        array[number] = signatures.Step(layer.packed.handle, image, bias, *offsets, *tensors, *options)
    return Prepared(array, floats, tuple(layers[place - inputs].patches for place in outputs), tuple(layers))


def run(prepared: Prepared, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The results that are returned; None if an input or an intermediate result of a layer holds NaN or infinity.

    None too for a number that is infinite in bfloat16. inputs: float32 on the CPU, in the sizes and the layout that
    the chain was prepared for.
    """
    buffer = inputs[0].new_empty(prepared.floats)
    outputs = tuple(inputs[0].new_empty_strided(sizes.out, sizes.strides) for sizes in prepared.outputs)
    addresses = [tensor.data_ptr() for tensor in (*inputs, buffer, *outputs)]
    places = (ctypes.c_void_p * len(addresses))(*addresses)
    code = library.entries().many_chain(prepared.steps, len(prepared.layers), places, library.thread_count())
    if code == library.ODD_INPUT:
        return None
    library.check_code(code)
    return outputs


def _floats(patches: Patches) -> int:
    batch, rows, high, wide = patches.out
    return batch * rows * high * wide
