"""The regular pattern that a mask follows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunella.graph.data import Layer
from prunella.graph.matrix import to_matrix
from prunella.types import Mask

GROUPS = (2, 4, 8, 16, 32)
SIDES = (64, 32, 16, 8, 4, 2, 1)
_SMALLEST = 4
_FEWEST = 8
"""Fewer groups than these may follow a pattern by chance."""


def pattern_of(mask: Mask, layer: Layer) -> str:
    """The pattern of a weight's mask in words: `rows`, `columns`, `2:4`, `block 16x1`, or `element`.

    `2:4 by channels` runs along the input channels of a convolution, as sparse tensor cores take it; plain `2:4` along
    the columns of the matrix `(out, in * kernel)`, as `NM` does.
    """
    matrix = to_matrix(mask, layer)
    if bool(matrix.all()):
        return "dense"
    if bool((matrix == matrix[:, :1]).all()):
        return "rows"
    if bool((matrix == matrix[:1]).all()):
        return "columns"
    for pattern in _nm(matrix):
        return pattern
    if mask.dim() > 2:
        order = [layer.out_axis, *(a for a in range(mask.dim()) if a not in (layer.out_axis, layer.in_axis))]
        for pattern in _nm(mask.permute([*order, layer.in_axis]).flatten(1)):
            return f"{pattern} by channels"
    return next(_blocks(matrix), "element")


def _nm(matrix: Tensor) -> Iterator[str]:
    """N:M for the smallest M that every group of M follows exactly."""
    for m in GROUPS:
        if matrix.shape[1] % m == 0 and matrix.numel() // m >= _FEWEST:
            counts = matrix.reshape(-1, m).sum(1)
            if bool((counts == counts[0]).all()) and 0 < int(counts[0]) < m:
                yield f"{int(counts[0])}:{m}"


def _blocks(matrix: Tensor) -> Iterator[str]:
    """The largest blocks that are kept or removed as a whole."""
    rows, cols = matrix.shape
    sides = [(r, c) for r in SIDES for c in SIDES if r * c >= _SMALLEST and rows % r == 0 and cols % c == 0]
    for r, c in sorted(sides, key=lambda side: (-side[0] * side[1], -side[0])):
        tiles = matrix.reshape(rows // r, r, cols // c, c).to(torch.int32).sum((1, 3))
        if tiles.numel() >= _FEWEST and bool(((tiles == 0) | (tiles == r * c)).all()):
            yield f"block {r}x{c}"
