"""Exact selection for all methods. Ties never change the number of kept units: the lowest index is kept."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunella.types import Mask, Scores

Counts = tuple[int, ...]
FEW = 8
"""Largest number of scores for which all pairs are compared."""


def keep_top(scores: Tensor, k: int) -> Mask:
    """Exactly `k` True along the last dimension: the highest scores; of equal scores the lowest index.

    A threshold alone is not exact: at equal scores `> t` keeps too few and `>= t` too many.
    """
    size = scores.shape[-1]
    if not 0 <= k <= size:
        raise ValueError(f"cannot keep {k} of {size}")
    if k in (0, size):
        return torch.full(scores.shape, k == size, dtype=torch.bool, device=scores.device)
    if size <= FEW:
        return _keep_few(scores, k)
    edge = scores.kthvalue(size - k + 1, dim=-1, keepdim=True).values
    above, level = scores > edge, scores == edge
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def _keep_few(scores: Tensor, k: int) -> Mask:
    """`keep_top` by comparing all pairs. For small groups `kthvalue` takes thirty times as long."""
    columns = scores.movedim(-1, 0).contiguous()
    ahead = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
    for late in range(1, len(columns)):
        for early in range(late):
            loses = columns[early] >= columns[late]
            ahead[late] += loses
            ahead[early] += ~loses
    return (ahead < k).movedim(0, -1).contiguous()


def removal_order(scores: Scores) -> Tensor:
    """Indices of a vector in the order of removal: lowest score first; of equal scores the highest index first.

    Dropping the first `n - k` of them leaves exactly `keep_top(scores, k)`.
    """
    return torch.sort(scores, descending=True, stable=True).indices.flip(0)


def weights_freed(scores: Scores, sizes: Scores) -> Tensor:
    """Weights removed in total after each step, for units of several weights: lowest scores first."""
    return sizes[removal_order(scores)].cumsum(0).round().long()


def without_lowest(scores: Scores, count: int) -> Mask:
    """The mask of a vector without its `count` lowest scores."""
    mask = torch.ones(len(scores), dtype=torch.bool, device="cpu")
    mask[removal_order(scores.cpu())[:count]] = False
    return mask


def shortest_prefix(ladders: Sequence[Tensor], met: Callable[[Counts], bool]) -> Counts | None:
    """The smallest number of steps on each ladder for which `met` holds; None if it never holds.

    A ladder is a non-decreasing vector of float64 keys. The keys of all ladders form one order (equal keys: the last
    ladder first, as `keep_top` on their concatenation). A bisection finds the shortest prefix of this order: first over
    the value of the key, then over the steps that share this value. `met` must be monotonic. The order is never built
    in memory, so that a ladder may hold the weights of a large layer.
    """
    full = tuple(len(ladder) for ladder in ladders)
    zero = (0,) * len(ladders)
    if met(zero):
        return zero
    if not met(full):
        return None
    edge = _edge(ladders, met)
    base = _passed(ladders, edge, right=False)
    level = tuple(b - a for a, b in zip(base, _passed(ladders, edge, right=True), strict=True))
    low, high = 1, sum(level)
    while low < high:
        middle = (low + high) // 2
        if met(_spend(base, level, middle)):
            high = middle
        else:
            low = middle + 1
    return _spend(base, level, low)


def _edge(ladders: Sequence[Tensor], met: Callable[[Counts], bool]) -> float:
    """The smallest key for which all steps up to this key meet the target."""
    filled = [ladder for ladder in ladders if len(ladder)]
    low = min(_ordinal(float(ladder[0])) for ladder in filled)
    high = max(_ordinal(float(ladder[-1])) for ladder in filled)
    met_at: dict[Counts, bool] = {}
    while low < high:
        middle = (low + high) // 2
        counts = _passed(ladders, _from_ordinal(middle), right=True)
        if counts not in met_at:
            met_at[counts] = met(counts)
        if met_at[counts]:
            high = middle
        else:
            low = middle + 1
    return _from_ordinal(low)


def _passed(ladders: Sequence[Tensor], key: float, *, right: bool) -> Counts:
    return tuple(int(torch.searchsorted(ladder, key, right=right)) for ladder in ladders)


def _spend(base: Counts, level: Counts, steps: int) -> Counts:
    """`base` plus `steps` of the steps with equal keys (`level`), the last ladder first."""
    counts = list(base)
    for index in reversed(range(len(base))):
        counts[index] += min(level[index], steps)
        steps -= min(level[index], steps)
    return tuple(counts)


def _ordinal(value: float) -> int:
    """Position of a float64 among all float64: ordered as the values are, neighbors differ by one."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits) if bits >= 0 else -(int(bits) & 0x7FFF_FFFF_FFFF_FFFF)


def _from_ordinal(ordinal: int) -> float:
    bits = ordinal if ordinal >= 0 else -ordinal | -0x8000_0000_0000_0000
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)
