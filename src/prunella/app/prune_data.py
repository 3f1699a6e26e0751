"""Batches for `prune`: inputs without labels, some to fit and some held out to judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prunella.model.batches import Listed, listed
from prunella.model.forward import inputs_of
from prunella.model.trees import tensors
from prunella.types import Loss

MOST = 128
"""Most batches that are used."""


@dataclass(frozen=True)
class Batches:
    """fit: for statistics, least squares and training. held_out: for judging, never the same samples. note: what of the
    data is not used, or used twice; empty otherwise. every: all batches in their order, so that each has a number."""

    fit: tuple[Any, ...]
    held_out: tuple[Any, ...]
    note: str = ""
    every: Listed = field(default_factory=Listed, repr=False)

    @property
    def parts(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What an identity reads."""
        return self.fit, self.held_out


def split(model: nn.Module, data: Iterable[Any], loss: Loss | None) -> Batches:
    """A quarter of the batches, or of the samples of the only batch, is held out.

    Without a loss, of a batch of inputs and labels the inputs alone are used. Errors: RequestError without batches.
    """
    given = listed(itertools.islice(data, MOST + 1))
    note = f"only the first {MOST} batches are used" if len(given) > MOST else ""
    every = listed(batch if loss else inputs_of(model, batch) for batch in given[:MOST])
    if len(every) > 1:
        fit = tuple(batch for number, batch in enumerate(every) if number % 4 != 1)
        return Batches(fit, tuple(batch for number, batch in enumerate(every) if number % 4 == 1), note, every)
    count = size(every[0])
    if count < 2 or not all(tensor.shape[0] == count for tensor in tensors(every[0]) if tensor.dim()):
        return Batches(tuple(every), tuple(every), "nothing is held out: the only batch cannot be split", every)
    at = count - max(1, count // 4)
    return Batches((part(every[0], 0, at),), (part(every[0], at, count),), note, every)


def first(batches: Sequence[Any], samples: int) -> tuple[Any, ...]:
    """The first batches that hold so many samples together, at least one; the last one is cut."""
    chosen, left = list[Any](), samples
    for batch in batches:
        if chosen and left <= 0:
            break
        chosen.append(batch if size(batch) <= left else part(batch, 0, max(1, left)))
        left -= size(batch)
    return tuple(chosen)


def size(batch: Any) -> int:
    """Number of samples."""
    return next((tensor.shape[0] for tensor in tensors(batch) if tensor.dim()), 1)


def part(batch: Any, start: int, stop: int, count: int | None = None) -> Any:
    """Samples `start` to `stop` of a batch: of tensors with one position for each sample; other values are shared."""
    count = size(batch) if count is None else count
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: part(value, start, stop, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [part(value, start, stop, count) for value in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
