"""Forms: an operation as products of matrices `(out, in)` with columns of its input.

A form describes `y = columns @ matrix^T`, matrix by matrix: the weight as matrices `(groups, out, in)`, the input as
columns `(tokens, in)`, the output as rows `(tokens, out)`. Norms, Gram matrices, least squares and paths all take the
inputs of a weight from its form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 8_000_000
"""Largest number of elements of an unfolded convolution input in memory, at least one sample."""
Chunk = tuple[Tensor, slice]
"""Columns `(tokens, in)`, and the slice of their tokens."""


class Form(Protocol):
    """How one operation reads a weight. `shape` is that of the weight as the operation reads it."""

    @property
    def orientation(self) -> tuple[object, ...]:
        """Equal for two reads of one tensor if both have the same matrices."""
        ...

    @property
    def layout(self) -> object:
        """Equal for two reads with the same columns of one input; None if unknown."""
        ...

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Number of matrices, outputs and inputs of each."""
        ...

    def matrices(self, operand: Tensor) -> Tensor:
        """The weight as `(groups, out, in)`."""
        ...

    def restored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `matrices`."""
        ...

    def columns(self, x: Tensor, shape: Sequence[int], group: int, keep: Tensor | None = None) -> Iterator[Chunk]:
        """The inputs of one matrix, in chunks. keep: indices of its columns."""
        ...

    def columns_at(
        self, x: Tensor, shape: Sequence[int], group: int, tokens: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """The inputs of one matrix for these tokens alone; the others are not unfolded."""
        ...

    def rows(self, y: Tensor, shape: Sequence[int], group: int, tokens: Tensor | None = None) -> Tensor:
        """The output of one matrix: `(tokens, out)`. tokens: which; None for all."""
        ...

    @property
    def output_axis(self) -> int | None:
        """The axis of the output that holds the outputs of all matrices; None if there is no single axis."""
        ...

    def total(self, values: Tensor, shape: Sequence[int], *, once: bool = False) -> Tensor:
        """Totals over all tokens of values in the shape of the input: float64, in a shape that broadcasts to `shape`.

        Each value counts once per product (in a convolution once per patch, padding included); with `once` exactly
        once.
        """
        ...

    def input_sums(self, x: Tensor, shape: Sequence[int], group: int) -> tuple[Tensor, int]:
        """Sums over tokens of the inputs of one matrix, per column or per channel, and the number of tokens."""
        ...


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors, as in einsum: one letter for each axis of the input, the weight and the output.

    Letters in all three number the matrices. Letters of input and weight are summed over, letters of weight and output
    are outputs, letters of input and output are tokens. Every letter is in at least two of the three.
    """

    x: str
    weight: str
    y: str

    @cached_property
    def batch(self) -> str:
        """Axes that number the matrices."""
        return "".join(a for a in self.weight if a in self.x and a in self.y)

    @cached_property
    def inner(self) -> str:
        """Axes that are summed over."""
        return "".join(a for a in self.weight if a in self.x and a not in self.y)

    @cached_property
    def outer(self) -> str:
        """Axes of the weight that are in the output but not in the input."""
        return "".join(a for a in self.weight if a not in self.x)

    @cached_property
    def tokens(self) -> str:
        """Axes of the input that are in the output but not in the weight."""
        return "".join(a for a in self.x if a not in self.weight)

    @property
    def orientation(self) -> tuple[object, ...]:
        """The axes of the weight in the order of its matrices."""
        return tuple(tuple(map(self.weight.index, part)) for part in (self.batch, self.outer, self.inner))

    @property
    def layout(self) -> object:
        """The axes of the input in the order of its columns."""
        return tuple(tuple(map(self.x.index, part)) for part in (self.batch, self.tokens, self.inner))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Number of matrices, their outputs, their inputs."""
        known = dict(zip(self.weight, shape, strict=True))
        groups, out, wide = (math.prod(known[a] for a in part) for part in (self.batch, self.outer, self.inner))
        return groups, out, wide

    def matrices(self, operand: Tensor) -> Tensor:
        """Axes in the order: matrices, outputs, inputs."""
        order = [self.weight.index(a) for a in self.batch + self.outer + self.inner]
        return operand.permute(order).reshape(self.sizes(operand.shape))

    def restored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `matrices`."""
        order = [self.weight.index(a) for a in self.batch + self.outer + self.inner]
        back = [order.index(axis) for axis in range(len(order))]
        return matrices.reshape([shape[axis] for axis in order]).permute(back)

    def columns(self, x: Tensor, shape: Sequence[int], group: int, keep: Tensor | None = None) -> Iterator[Chunk]:
        """All tokens at once."""
        columns = self._flat(x, self.x, self.inner, shape, group)
        yield (columns if keep is None else columns.index_select(1, keep)), slice(None)

    def columns_at(
        self, x: Tensor, shape: Sequence[int], group: int, tokens: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Of one matrix of the input."""
        columns = self._flat(x, self.x, self.inner, shape, group).index_select(0, tokens)
        return columns if keep is None else columns.index_select(1, keep)

    def rows(self, y: Tensor, shape: Sequence[int], group: int, tokens: Tensor | None = None) -> Tensor:
        """Tokens in the order of `columns`."""
        rows = self._flat(y, self.y, self.outer, shape, group)
        return rows if tokens is None else rows.index_select(0, tokens)

    @property
    def output_axis(self) -> int | None:
        """The last one."""
        return -1 if self.outer == self.y[-1:] and not self.batch else None

    def total(self, values: Tensor, shape: Sequence[int], *, once: bool = False) -> Tensor:
        """Every value is multiplied once by each output."""
        order = [self.x.index(a) for a in self.batch + self.tokens + self.inner]
        moved = values.permute(order)
        sizes = moved.shape
        start, end = len(self.batch), len(self.batch) + len(self.tokens)
        flat = moved.reshape(*sizes[:start], sizes[start:end].numel(), *sizes[end:])
        sums = flat.sum(start, dtype=torch.float64)
        there = self.batch + self.inner
        sums = sums.permute([there.index(a) for a in self.weight if a in there])
        return sums.reshape([size if a in there else 1 for a, size in zip(self.weight, shape, strict=True)])

    def input_sums(self, x: Tensor, shape: Sequence[int], group: int) -> tuple[Tensor, int]:
        """Of every column."""
        ((columns, _),) = self.columns(x, shape, group)
        return columns.double().sum(0), len(columns)

    def _flat(self, tensor: Tensor, axes: str, last: str, shape: Sequence[int], group: int) -> Tensor:
        """One matrix's part of an input or output: `(tokens, last)`."""
        moved = tensor.permute([axes.index(a) for a in self.batch + self.tokens + last])
        known = dict(zip(self.weight, shape, strict=True))
        place: list[int] = []
        for a in reversed(self.batch):
            group, number = divmod(group, known[a])
            place.insert(0, number)
        moved = moved[tuple(place)]
        count = len(self.tokens)
        return moved.reshape(moved.shape[:count].numel(), moved.shape[count:].numel())


@dataclass(frozen=True)
class Convolution:
    """A convolution of `len(stride)` dimensions; padding by (before, after). The weight's axes are those of torch.

    transposed: the weight is `(in, out / groups, *kernel)`, and the input is spread by the stride instead of the
    output. Columns are `in / groups * kernel`, as in `weight.flatten(1)` of a weight with its outputs first.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def orientation(self) -> tuple[object, ...]:
        """The axes of outputs, and the groups."""
        return "convolution", len(self.stride), self.groups, self.transposed

    @property
    def layout(self) -> object:
        """It depends on the kernel."""
        return None

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Number of groups, output channels of each, input channels of each times kernel."""
        first, second, taps = shape[0] // self.groups, shape[1], math.prod(shape[2:])
        return (self.groups, second, first * taps) if self.transposed else (self.groups, first, second * taps)

    def matrices(self, operand: Tensor) -> Tensor:
        """Group by group, outputs first."""
        parts = operand.view(self.groups, -1, *operand.shape[1:])
        return (parts.transpose(1, 2) if self.transposed else parts).flatten(2)

    def restored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `matrices`."""
        first = shape[0] // self.groups
        if not self.transposed:
            return matrices.reshape(tuple(shape))
        parts = matrices.reshape(self.groups, shape[1], first, *shape[2:])
        return parts.transpose(1, 2).reshape(tuple(shape))

    def columns(self, x: Tensor, shape: Sequence[int], group: int, keep: Tensor | None = None) -> Iterator[Chunk]:
        """The patches, a few samples at a time; for a transposed convolution those of the input spread with zeros."""
        kernel = tuple(shape[2:])
        x, keep = self._of_channels(x, kernel, group, keep)
        tokens = math.prod(self._grid(x.shape[2:], kernel))
        step = max(1, CHUNK // max(x.shape[1] * math.prod(kernel) * tokens, 1))
        for start in range(0, x.shape[0], step):
            patches = self._patches(x[start : start + step], kernel)
            part = patches.reshape(patches.shape[: len(kernel) + 1].numel(), patches.shape[len(kernel) + 1 :].numel())
            part = part if keep is None else part.index_select(1, keep)
            yield part, slice(start * tokens, start * tokens + len(part))

    def columns_at(
        self, x: Tensor, shape: Sequence[int], group: int, tokens: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """The patches at these positions."""
        kernel = tuple(shape[2:])
        x, keep = self._of_channels(x, kernel, group, keep)
        patches = self._patches(x, kernel)
        part = patches[torch.unravel_index(tokens, patches.shape[: len(kernel) + 1])].flatten(1)
        return part if keep is None else part.index_select(1, keep)

    def rows(self, y: Tensor, shape: Sequence[int], group: int, tokens: Tensor | None = None) -> Tensor:
        """One row for each sample and position."""
        y = self._of_group(y, group).movedim(1, -1)
        return y.reshape(-1, y.shape[-1]) if tokens is None else y[torch.unravel_index(tokens, y.shape[:-1])]

    @property
    def output_axis(self) -> int | None:
        """The channels."""
        return 1

    def total(self, values: Tensor, shape: Sequence[int], *, once: bool = False) -> Tensor:
        """Over patches, without unfolding; a transposed convolution counts every value once."""
        if self.transposed:
            return _by_channel(values).view(-1, *[1] * (len(shape) - 1))
        sums = _by_channel(values) if once else self._patch_sums(values, tuple(shape[2:]))
        sums = sums.view(*sums.shape, *[1] * (len(shape) - 1 - sums.dim()))
        if self.groups == 1:
            return sums.unsqueeze(0)
        return sums.view(self.groups, -1, *sums.shape[1:]).repeat_interleave(shape[0] // self.groups, 0)

    def input_sums(self, x: Tensor, shape: Sequence[int], group: int) -> tuple[Tensor, int]:
        """Per channel without padding; for a transposed convolution per column."""
        if not self.transposed:
            channels = self._of_group(x, group).movedim(1, -1)
            channels = channels.reshape(-1, channels.shape[-1]).double()
            return channels.sum(0), len(channels)
        parts = [columns.double() for columns, _ in self.columns(x, shape, group)]
        return torch.stack([part.sum(0) for part in parts]).sum(0), sum(map(len, parts))

    def _of_group(self, tensor: Tensor, group: int) -> Tensor:
        if self.groups == 1:
            return tensor
        size = tensor.shape[1] // self.groups
        return tensor.narrow(1, group * size, size)

    def _grid(self, spatial: Sequence[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The positions of the output."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True)]
        sizes = zip(spatial, self.padding, spans, self.stride, strict=True)
        if self.transposed:
            padded = zip(sizes, self.output_padding, strict=True)
            return tuple((n - 1) * step - sum(sides) + span + more for (n, sides, span, step), more in padded)
        return tuple((n + sum(sides) - span) // step + 1 for n, sides, span, step in sizes)

    def _of_channels(
        self, x: Tensor, kernel: tuple[int, ...], group: int, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The input channels of a group, only those that `keep` has in full; and what is left to choose."""
        x = self._of_group(x, group)
        channels = None if keep is None else _whole_channels(keep, math.prod(kernel))
        return (x, keep) if channels is None else (x.index_select(1, channels), None)

    def _patches(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """`(samples, *positions, in, *kernel)`, a view of the padded input."""
        padding, stride = self.padding, self.stride
        if self.transposed:
            x = _spread(x, self.stride)
            spans = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            sides = zip(spans, self.padding, self.output_padding, strict=True)
            padding = tuple((s - before, s - after + more) for s, (before, after), more in sides)
            stride = (1,) * len(kernel)
        x = pad(x, [side for pair in reversed(padding) for side in pair])
        for axis, size in enumerate(kernel):
            span = self.dilation[axis] * (size - 1) + 1
            x = x.unfold(2 + axis, span, stride[axis])[..., :: self.dilation[axis]]
        spatial = len(kernel)
        if self.transposed:  # the last tap of the kernel multiplies the first value of the patch
            x = x.flip(tuple(range(2 + spatial, 2 + 2 * spatial)))
        return x.permute([0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)])

    def _patch_sums(self, values: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Total of every entry of the patches, by channel and position in the kernel."""
        grid = self._grid(values.shape[2:], kernel)
        sums = values.sum(0, dtype=torch.float64)
        sums = pad(sums, [side for pair in reversed(self.padding) for side in pair])
        entries = []
        for place in itertools.product(*map(range, kernel)):
            starts = [p * d for p, d in zip(place, self.dilation, strict=True)]
            cut = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, self.stride, grid, strict=True)]
            entries.append(sums[(slice(None), *cut)].flatten(1).sum(1))
        return torch.stack(entries, 1).view(values.shape[1], *kernel)


def _by_channel(values: Tensor) -> Tensor:
    return values.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input with `stride - 1` zeros between its values."""
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
    return wide


def _whole_channels(keep: Tensor, taps: int) -> Tensor | None:
    """The channels, if the columns are all taps of these channels; else None."""
    if len(keep) % taps:
        return None
    blocks = keep.view(-1, taps)
    channels = blocks[:, 0] // taps
    complete = torch.equal(blocks, channels[:, None] * taps + torch.arange(taps, device=keep.device))
    return channels if complete else None
