"""Labels of tensor dimensions, and the relations between them.

Each position of each dimension has *atoms*: the position is kept exactly if all its atoms are kept. A `Dim` is a tuple
of layers, each an integer vector with one atom per position; `()` is a dimension that is always kept. Atom 0 is always
kept. Operations relate atoms in two ways: atoms are equal, or an atom is the conjunction of others (a view that factors
an axis: position `i * n + j` is kept exactly if row `i` and column `j` are kept).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from prunella.graph.data import Ints, ReasonKind

Dim = tuple[Ints, ...]
WHOLE: Dim = ()


@dataclass(frozen=True, eq=False)
class And:
    """Position `i` of `whole` is kept exactly if position `i` of every factor is kept."""

    whole: Ints
    factors: tuple[Ints, ...]


Soft = Literal["", "norm", "choice", "route", "lookup", "output"]


@dataclass(frozen=True)
class Reason:
    """Why positions are frozen, and the line of the model's source.

    soft: what a removal would change. `norm`: statistics are taken over the kept positions. `choice`: a choice is made
    among the kept positions. `route`: values are sent to the chosen positions. `lookup`: an input of the model indexes
    the positions. `output`: the positions are an output. Empty: a removal is never possible.
    example: the run that shows it.
    """

    text: str
    where: str = ""
    soft: Soft = ""
    kind: ReasonKind = ReasonKind.OPERATION
    example: int = 0


@dataclass(frozen=True, eq=False)
class Run:
    """The `number`-th call of `name` runs along axis `axis` of its first tensor, whose labels are `layer`.

    Calls are counted in the run on one example.
    """

    name: str
    number: int
    axis: int
    layer: Ints
    example: int = 0


@dataclass
class Ledger:
    """Atoms and their relations, filled while the model runs."""

    size: int = 1
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    ands: list[And] = field(default_factory=list)
    frozen: list[tuple[Ints, Reason]] = field(default_factory=list)
    batched: list[Ints] = field(default_factory=list)
    multiples: list[tuple[Ints, int]] = field(default_factory=list)
    min_units: list[tuple[Ints, int]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def fresh(self, length: int) -> Dim:
        """A new axis with a new atom at each position; a single position is always kept."""
        if length <= 1:
            return WHOLE
        start, self.size = self.size, self.size + length
        return (np.arange(start, start + length, dtype=np.int64),)

    def freeze(self, dim: Dim, reason: Reason) -> None:
        """Freeze all positions of `dim`."""
        for layer in dim:
            self.frozen.append((layer, reason))

    def single(self, dim: Dim) -> Dim:
        """The same axis with at most one layer."""
        if len(dim) <= 1:
            return dim
        whole = self.fresh(len(dim[0]))
        self.ands.append(And(whole[0], dim))
        return whole

    def equal(self, first: Dim, second: Dim, reason: Reason) -> Dim:
        """Couple both dims position by position; returns the simpler one."""
        if first is second or (len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))):
            return first
        if not first or not second:
            self.freeze(first or second, reason)
            return WHOLE
        if len(first) == len(second) and all(_same_pattern(a, b) for a, b in zip(first, second, strict=True)):
            self.edges += zip(first, second, strict=True)
            return first
        one, other = (first, second) if len(first) <= len(second) else (second, first)
        one = self.single(one)
        if len(other) == 1:
            self.edges.append((one[0], other[0]))
        else:
            self.ands.append(And(one[0], other))
        return one

    def split(self, dim: Dim, sizes: Sequence[int]) -> tuple[Dim, ...]:
        """Factor an axis of `prod(sizes)` positions, as `view` does."""
        layers_of: list[list[Ints]] = [[] for _ in sizes]
        for layer in dim:
            grid = layer.reshape(tuple(sizes))
            along = [k for k in range(len(sizes)) if _varies(grid, k)]
            if not along and layer.any():
                along = [int(np.argmax(sizes))]
            if len(along) == 1:
                layers_of[along[0]].append(
                    np.ascontiguousarray(np.moveaxis(grid, along[0], 0).reshape(sizes[along[0]], -1)[:, 0])
                )
            elif along:
                self._factor(layer, sizes, along, layers_of)
        return tuple(tuple(layers) for layers in layers_of)

    def _factor(self, layer: Ints, sizes: Sequence[int], along: list[int], layers_of: list[list[Ints]]) -> None:
        factors = []
        for k in along:
            axis = self.fresh(sizes[k])[0]
            layers_of[k].append(axis)
            shape = [sizes[k] if j == k else 1 for j in range(len(sizes))]
            factors.append(np.broadcast_to(axis.reshape(shape), tuple(sizes)).reshape(-1))
        self.ands.append(And(layer, tuple(factors)))

    def concatenate(self, dims: Sequence[Dim], lengths: Sequence[int]) -> Dim:
        """Axes one after the other."""
        if not any(dims):
            return WHOLE
        single = [self.single(dim) for dim in dims]
        parts = [d[0] if d else np.zeros(n, dtype=np.int64) for d, n in zip(single, lengths, strict=True)]
        return (np.concatenate(parts),)


def merge(dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Several axes merged into one of `prod(sizes)` positions, the last axis the fastest."""
    layers = []
    for k, dim in enumerate(dims):
        shape = [sizes[k] if j == k else 1 for j in range(len(sizes))]
        layers += [np.broadcast_to(layer.reshape(shape), tuple(sizes)).reshape(-1) for layer in dim]
    return tuple(layers)


def take(dim: Dim, index: slice | Ints) -> Dim:
    """Some positions of an axis, in the given order."""
    return tuple(np.ascontiguousarray(layer[index]) for layer in dim)


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Pairs of dims of shape `old` and of shape `new` with the same product, block by block."""
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j, a, b = i, j, 1, 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield range(first_i, i), range(first_j, j)


def sources(old: Sequence[int], new: Sequence[int]) -> list[int | None]:
    """For each dim of shape `new` the equal dim of shape `old`; None for a mixture or a dim of size 1."""
    source_of: list[int | None] = [None] * len(new)
    for before, after in blocks(old, new):
        long_before, long_after = [k for k in before if old[k] != 1], [k for k in after if new[k] != 1]
        if len(long_before) == len(long_after) == 1:
            source_of[long_after[0]] = long_before[0]
    return source_of


def reshape(ledger: Ledger, dims: Sequence[Dim], old: Sequence[int], new: Sequence[int]) -> list[Dim]:
    """The dims of a tensor of shape `old` seen in shape `new`, by their common factors."""
    result: list[Dim] = [WHOLE] * len(new)
    same = sources(old, new)
    for before, after in blocks(old, new):
        flat = merge([dims[k] for k in before], [old[k] for k in before])
        if not flat:
            continue
        kept = [k for k in after if same[k] is not None]
        if kept:
            result[kept[0]] = dims[same[kept[0]] or 0]
        else:
            result[after.start : after.stop] = ledger.split(flat, [new[k] for k in after])
    return result


def _varies(grid: Ints, axis: int) -> bool:
    first = np.take(grid, [0], axis=axis)
    return bool((grid != first).any())


def _same_pattern(a: Ints, b: Ints) -> bool:
    """True if both vectors have repeated values at the same positions."""
    return len(a) == len(b) and bool((_pattern(a) == _pattern(b)).all())


def _pattern(vector: Ints) -> Ints:
    _, first, inverse = np.unique(vector, return_index=True, return_inverse=True)
    return np.asarray(first[inverse.reshape(-1)], dtype=np.int64)
