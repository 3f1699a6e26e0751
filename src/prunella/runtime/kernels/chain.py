"""Convolutions that follow each other, in one call of the kernels.

What is in between lies in one piece of memory, parts of which are given out again as soon as nothing reads them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.convolution import Patches
from prunella.runtime.kernels.library import Activation, Packed

_LINE = 16
"""Floats of a cache line: every piece of memory begins with one."""


@dataclass(frozen=True)
class Step:
    """Places of what a layer reads, among the inputs and what the layers before gave; `free`: those read last here."""

    x: int
    residual: int | None
    free: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ready:
    """A layer for one size of images: its weight as the kernel wants it, and what goes with that."""

    packed: Packed
    patches: Patches
    bias: Tensor | None
    activation: Activation


@dataclass(frozen=True)
class Prepared:
    """Steps as the kernels take them. floats: of the memory in between; outputs: the sizes of what comes out."""

    steps: Any = field(repr=False)
    floats: int
    outputs: tuple[Patches, ...]
    kept: tuple[Ready, ...] = field(repr=False)


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "image", "bias")),
        *((name, ctypes.c_int64) for name in ("x", "residual", "y")),
        *((name, ctypes.c_int32) for name in ("x_place", "residual_place", "y_place", "activation", "tile")),
    )


class _Memory:
    """Gives out pieces of one memory, in whole cache lines."""

    def __init__(self) -> None:
        self.end = 0
        self.holes: list[tuple[int, int]] = []  # size, beginning

    def take(self, floats: int) -> int:
        size = _lines(floats)
        fitting = min((hole for hole in self.holes if hole[0] >= size), default=None)
        if fitting is None:
            self.end += size
            return self.end - size
        self.holes.remove(fitting)
        if fitting[0] > size:
            self.holes.append((fitting[0] - size, fitting[1] + size))
        return fitting[1]

    def give(self, floats: int, begin: int) -> None:
        size = _lines(floats)
        for hole in list(self.holes):
            if hole[1] + hole[0] == begin or begin + size == hole[1]:
                self.holes.remove(hole)
                begin, size = min(begin, hole[1]), size + hole[0]
        self.holes.append((size, begin))


def _lines(floats: int) -> int:
    return -(-floats // _LINE) * _LINE


def laid(
    steps: Sequence[Step], sizes: Sequence[int], inputs: int, outputs: Sequence[int]
) -> tuple[dict[int, int], int]:
    """Where the results lie that do not come out: place -> first float, of so many in all.

    sizes: floats of each result. A result takes the memory of the residual that is added to it, if nothing else reads
    that: every number is read before that which replaces it.
    """
    memory, at = _Memory(), dict[int, int]()
    for number, step in enumerate(steps):
        y, free = inputs + number, [place for place in step.free if place in at]
        if y not in outputs:
            if step.residual in free and step.residual != step.x:
                free.remove(step.residual)
                at[y] = at[step.residual]
            else:
                at[y] = memory.take(sizes[number])
        for place in free:
            memory.give(sizes[place - inputs], at[place])
    return at, memory.end


def prepared(steps: Sequence[Step], ready: Sequence[Ready], inputs: int, outputs: Sequence[int]) -> Prepared:
    """Steps for one size of the inputs. inputs: how many; outputs: places of what comes out."""
    at, floats = laid(steps, [_floats(one.patches) for one in ready], inputs, outputs)

    def where(place: int | None) -> tuple[int, int]:
        """Number of the memory, and the first float there."""
        if place is None:
            return -1, 0
        if place in at:
            return inputs, at[place]
        return place if place < inputs else inputs + 1 + outputs.index(place), 0

    made = (_Step * len(steps))()
    for number, (step, one) in enumerate(zip(steps, ready, strict=True)):
        places, begins = zip(*map(where, (step.x, step.residual, inputs + number)), strict=True)
        image, bias = ctypes.cast(one.patches.image, ctypes.c_void_p), None if one.bias is None else one.bias.data_ptr()
        numbers = native.NUMBERS[one.activation], one.packed.config.tile
        made[number] = _Step(one.packed.handle, image, bias, *begins, *places, *numbers)
    return Prepared(made, floats, tuple(ready[place - inputs].patches for place in outputs), tuple(ready))


def run(prepared: Prepared, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """What comes out, or None where a number of an input or in between is not finite, or would not be in bfloat16.

    inputs: float32 on the CPU, of the sizes and in the layout that the steps were prepared for.
    """
    between = inputs[0].new_empty(prepared.floats)
    found = tuple(inputs[0].new_empty_strided(one.out, one.strides) for one in prepared.outputs)
    places = [tensor.data_ptr() for tensor in (*inputs, between, *found)]
    given = (ctypes.c_void_p * len(places))(*places)
    done = native.entries()[3](prepared.steps, len(prepared.kept), given, torch.get_num_threads())
    if done == native.ODD_INPUT:
        return None
    native.check_code(done)
    return found


def _floats(patches: Patches) -> int:
    batch, rows, high, wide = patches.out
    return batch * rows * high * wide
