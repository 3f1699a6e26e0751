"""Patterns of convolution kernels: rows of a kernel, kernels, filters, and a small set of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity.pattern import Block
from prunella.registry.method import granularity
from prunella.selection import keep_top
from prunella.types import Mask, Saliency

_SIDE = 3
_CELLS = _SIDE * _SIDE
_CENTER = _CELLS // 2


@granularity(source="Mao et al. 2017, arXiv:1705.08922")
@dataclass(frozen=True)
class Vector:
    """Runs of weights along the input: one row of one kernel, or `length` inputs of a layer without kernels.

    In the matrix `(out, in * kernel)` these are `1 x run` blocks, with `run` the last axis of the kernel where that is
    longer than 1 (3 of a 3x3 kernel), and `length` otherwise (linear layers, 1x1 convolutions). A run scores the sum
    over its weights. length: at least 1; the last run of a row may be shorter.

    Use: patterns between weights and kernels, where a kernel function loads one row at a time. Avoid: one ranking by
    sums over layers whose runs differ in length: take `uniform` or `erk`.
    """

    length: int = 4

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RequestError(
                f"Vector({self.length}) has no weights", "a run has at least 1 weight", "for example Vector(4)"
            )

    def on(self, shape: tuple[int, ...]) -> Block:
        """The blocks of a weight of shape `(out, in, *kernel)`."""
        last = shape[-1] if len(shape) > 2 else 1
        return Block(1, last if last > 1 else self.length)


@granularity(source="Mao et al. 2017, arXiv:1705.08922")
@dataclass(frozen=True)
class Kernel:
    """Kernels: all weights between one input channel and one output channel.

    In the matrix `(out, in * kernel)` these are blocks of `1 x kernel`. A kernel scores the sum over its weights. Where
    a layer has no kernel (linear layers, 1x1 convolutions) a kernel is a single weight.

    Use: compilers that skip connections between channels. Avoid: networks of 1x1 convolutions, where it is `Element()`.
    """

    def on(self, shape: tuple[int, ...]) -> Block:
        """The blocks of a weight of shape `(out, in, *kernel)`."""
        return Block(1, _cells(shape))


@granularity(source="Mao et al. 2017, arXiv:1705.08922; Li et al. 2017, arXiv:1608.08710")
@dataclass(frozen=True)
class Filter:
    """Masks of output rows of a weight. Shapes, biases, normalization and readers do not change.

    `Channel()` removes the same rows with everything coupled to them, and skips groups that may not be cut: the model
    gets smaller. `Filter()` only masks. It applies to every layer, also to the last one, and the bias or shift of a
    filter still reaches the next layer. A filter scores the sum over its weights.

    Use: the coarsest pattern in a comparison at equal sparsity, or soft masks in training. Avoid: a smaller or faster
    model: take `Channel()`.
    """

    def on(self, shape: tuple[int, ...]) -> Block:
        """The blocks of a weight of shape `(out, in, *kernel)`."""
        return Block(1, shape[1] * _cells(shape))


@granularity(source="Ma et al. 2020, arXiv:1909.05073 (PCONV); Niu et al. 2020, arXiv:2001.00138 (PatDNN)")
@dataclass(frozen=True)
class KernelPattern:
    """Every 3x3 kernel keeps `entries` weights, in one of at most `patterns` shapes that the network shares.

    The natural shape of a kernel is its center and the `entries - 1` highest others. The library holds the most
    frequent natural shapes over all layers of the plan (ties: the first one in reading order of the cells). Every
    kernel takes the shape that keeps the largest L2 norm of its scores. The sparsity is always `1 - entries / 9`.
    Layers with other kernels are an error: exclude them with skip=, or prune them by `Kernel()`.
    entries: 2 to 8. patterns: at least 1.

    Use: 3x3 networks on a compiler that unrolls shapes. Avoid: everything else: dense kernels multiply the zeros.
    """

    entries: int = 4
    patterns: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.entries < _CELLS or self.patterns < 1:
            why = f"2 to {_CELLS - 1} of {_CELLS} entries are kept, in at least one shape"
            raise RequestError(
                f"KernelPattern({self.entries}, {self.patterns}) is not a pattern",
                why,
                "for example KernelPattern(4, 8)",
            )

    @property
    def title(self) -> str:
        """As a user writes it."""
        return f"KernelPattern({self.entries}, {self.patterns})"

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        return 1 - self.entries / _CELLS

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why a weight of shape `(out, in, *kernel)` cannot have this pattern; empty if it can."""
        return "" if shape[2:] == (_SIDE, _SIDE) else f"its kernels are not {_SIDE}x{_SIDE}"

    def masks(self, scores: Sequence[Saliency]) -> list[Mask]:
        """The masks of the matrices `(out, in * 9)` of all layers."""
        kernels = [matrix.double().reshape(-1, _CELLS) for matrix in scores]
        if any(bool((cells < 0).any()) for cells in kernels):
            todo = "use a criterion such as magnitude, snip or taylor_sq"
            raise RequestError(f"{self.title} needs non-negative scores", "it compares squares of scores", todo)
        shapes = library(kernels, self.entries, self.patterns)
        chosen = [shapes[(cells.square() @ shapes.double().T).argmax(1)] for cells in kernels]
        return [mask.view_as(matrix) for mask, matrix in zip(chosen, scores, strict=True)]


def library(kernels: Sequence[Tensor], entries: int, patterns: int) -> Mask:
    """The most frequent natural shapes of kernels `(n, 9)`: bool `(shapes, 9)`, the most frequent first."""
    cells = torch.cat(list(kernels)).clone()
    cells[:, _CENTER] = torch.inf
    natural = keep_top(cells, entries)
    distinct, counts = torch.unique(natural.flip(1).long(), dim=0, return_counts=True)
    order = torch.argsort(counts.flip(0), descending=True, stable=True)[:patterns]
    shapes: Mask = distinct.flip(0)[order].flip(1).bool()
    return shapes


def _cells(shape: tuple[int, ...]) -> int:
    """Weights of one kernel."""
    return int(torch.Size(shape[2:]).numel())
