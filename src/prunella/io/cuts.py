"""Kept positions of a plan as JSON: runs of consecutive positions, equal lists once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunella.io.json import Fields, Value

_LARGEST = 1 << 28
"""Positions of an axis that a manifest may name."""
Cuts = Mapping[str, Mapping[int, Tensor]]


def encode_cuts(cuts: Cuts) -> dict[str, Any]:
    """Kept positions as runs `[start, stop)`; axes that are cut alike share one list."""
    lists: dict[tuple[tuple[int, int], ...], int] = {}
    axes = {
        name: {str(axis): lists.setdefault(_runs(kept.tolist()), len(lists)) for axis, kept in entry.items()}
        for name, entry in cuts.items()
    }
    return {"positions": [[list(run) for run in runs] for runs in lists], "axes": axes}


def decode_cuts(cuts: Fields, largest: int = _LARGEST) -> dict[str, dict[int, Tensor]]:
    """Undo `encode_cuts`. Errors: BadInput for what it never writes, such as a position of `largest` or above."""
    lists = [_positions(runs, largest) for runs in cuts.list_of("positions")]
    cuts_of: dict[str, dict[int, Tensor]] = {}
    for name, axes in cuts.section("axes").values():
        pairs = [(axis, value.integer(low=0, high=len(lists) - 1)) for axis, value in axes.fields().values()]
        cuts_of[name] = {int(axis): lists[index] for axis, index in pairs}
    return cuts_of


def _positions(runs: Value, largest: int) -> Tensor:
    pairs, end = [run.integers(low=0, high=largest) for run in runs.items()], 0
    for pair in pairs:  # in order and apart, so that they are no more than `largest` whatever the file says
        if len(pair) != 2 or not end <= pair[0] < pair[1]:
            raise runs.refused("runs of positions in order")
        end = pair[1]
    return torch.cat(
        [
            torch.zeros(0, dtype=torch.int64, device="cpu"),
            *(torch.arange(start, stop, device="cpu") for start, stop in pairs),
        ]
    )


def _runs(positions: list[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return tuple(runs)
