"""The weights that a drop-and-grow update exchanges, and the shares of layers in growth: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.selection import keep_top
from prunella.types import Mask


def exchange(mask: Mask, dropped: int, grown: int, drop: Tensor, grow: Tensor) -> tuple[Mask, Mask]:
    """The mask after an exchange, and the mask of the survivors: active weights that were not dropped.

    The `dropped` active weights with the lowest `drop` scores are removed, and the `grown` inactive weights with the
    highest `grow` scores are added. A weight that was just dropped grows again only if no other inactive weight is
    left. Counts are exact: `n - dropped + grown`.
    """
    flat, drop, grow = mask.flatten(), drop.flatten().double(), grow.flatten().double()
    kept = int(flat.sum()) - dropped
    survivors = keep_top(torch.where(flat, drop, -torch.inf), kept)
    tier = torch.where(flat, 0, 1) - torch.where(survivors, 2, 0)
    fresh = min(grown, int((tier == 1).sum()))
    born = keep_top(torch.where(tier == 1, grow, -torch.inf), fresh)
    born = born | keep_top(torch.where(tier == 0, grow, -torch.inf), grown - fresh)
    return (survivors | born).view_as(mask), survivors.view_as(mask)


def thin(masks: Sequence[Mask], scores: Sequence[Tensor], kept: int) -> list[Mask]:
    """Masks with exactly `kept` active weights in total: the highest scores over all layers, at least one per layer."""
    ranked = []
    for mask, score in zip(masks, scores, strict=True):
        values = torch.where(mask.flatten(), score.flatten().double(), -torch.inf)
        if bool(mask.any()):
            values[int(values.argmax())] = torch.inf
        ranked.append(values)
    chosen = torch.split(keep_top(torch.cat(ranked), kept), [mask.numel() for mask in masks])
    return [part.view_as(mask) for part, mask in zip(chosen, masks, strict=True)]


def fair_shares(total: int, weights: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """`total` split in proportion to `weights`, at most `rooms[i]` each: whole numbers whose sum is exactly `total`.

    An amount that exceeds a room goes to the other entries in proportion. The rest from rounding goes to the largest
    remainders.
    """
    if total > sum(rooms):
        raise ValueError(f"cannot place {total} in {sum(rooms)}")
    shares, open_ = [0.0] * len(rooms), [i for i, room in enumerate(rooms) if room]
    remaining = float(total)
    while open_ and remaining > 0:
        mass = sum(weights[i] for i in open_)
        want = {
            i: remaining * (weights[i] / mass if mass > 0 else rooms[i] / sum(rooms[j] for j in open_)) for i in open_
        }
        full = [i for i in open_ if want[i] >= rooms[i]]
        for i in full:
            shares[i] = float(rooms[i])
            remaining -= rooms[i]
        open_ = [i for i in open_ if i not in full]
        if not full:
            for i in open_:
                shares[i] = want[i]
            break
    counts = [min(room, int(share)) for share, room in zip(shares, rooms, strict=True)]
    order = sorted(range(len(rooms)), key=lambda i: (counts[i] - shares[i], i))
    while (missing := total - sum(counts)) > 0:
        for i in [i for i in order if counts[i] < rooms[i]][:missing]:
            counts[i] += 1
    return counts
