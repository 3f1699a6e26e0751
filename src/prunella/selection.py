"""Exact selection, the same under every method: ties never change how many are kept, and the lowest index stays."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunella.types import Mask, Scores

Counts = tuple[int, ...]
FEW = 8
"""Up to so many scores are compared each with each."""


def keep_top(scores: Tensor, k: int) -> Mask:
    """Exactly `k` True along the last dimension: the highest scores, among equal ones the lowest index.

    No threshold comparison decides on its own: `> t` keeps too few and `>= t` too many when scores are equal.
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
    """The same by counting who is ahead of whom: for groups of a few, `kthvalue` takes thirty times as long."""
    columns = scores.movedim(-1, 0).contiguous()
    ahead = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
    for late in range(1, len(columns)):
        for early in range(late):
            loses = columns[early] >= columns[late]
            ahead[late] += loses
            ahead[early] += ~loses
    return (ahead < k).movedim(0, -1).contiguous()


def removal_order(scores: Scores) -> Tensor:
    """Indices of a vector in the order of removal: lowest score first, among equal ones the highest index first.

    Dropping the first `n - k` of them leaves exactly `keep_top(scores, k)`.
    """
    return torch.sort(scores, descending=True, stable=True).indices.flip(0)


def shortest_prefix(ladders: Sequence[Tensor], met: Callable[[Counts], bool]) -> Counts | None:
    """How many steps to take on each ladder so that `met` holds with as few steps as possible; None if never.

    A ladder is a non-decreasing vector of float64 keys. All ladders are merged into one order by key (equal keys: the
    last ladder first, as `keep_top` on their concatenation would), and the shortest prefix of it is found by bisection:
    first over the value of the key, then over the steps that share it. `met` must stay true once it is. Nothing is
    merged in memory, so that a ladder may hold the weights of a large layer.
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
    """The smallest key such that all steps up to it meet the target."""
    filled = [ladder for ladder in ladders if len(ladder)]
    low = min(_ordinal(float(ladder[0])) for ladder in filled)
    high = max(_ordinal(float(ladder[-1])) for ladder in filled)
    known: dict[Counts, bool] = {}
    while low < high:
        middle = (low + high) // 2
        counts = _passed(ladders, _from_ordinal(middle), right=True)
        if counts not in known:
            known[counts] = met(counts)
        if known[counts]:
            high = middle
        else:
            low = middle + 1
    return _from_ordinal(low)


def _passed(ladders: Sequence[Tensor], key: float, *, right: bool) -> Counts:
    return tuple(int(torch.searchsorted(ladder, key, right=right)) for ladder in ladders)


def _spend(base: Counts, level: Counts, steps: int) -> Counts:
    """`base` plus `steps` of the equal steps `level`, the last ladder first."""
    counts = list(base)
    for index in reversed(range(len(base))):
        counts[index] += min(level[index], steps)
        steps -= min(level[index], steps)
    return tuple(counts)


def _ordinal(value: float) -> int:
    """Position of a float64 among all float64: ordered as the values are, neighbours differ by one."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits) if bits >= 0 else -(int(bits) & 0x7FFF_FFFF_FFFF_FFFF)


def _from_ordinal(ordinal: int) -> float:
    bits = ordinal if ordinal >= 0 else -ordinal | -0x8000_0000_0000_0000
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)
