"""Batches for `prune`: inputs without labels, some for fitting and some held out for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from prunella.errors import BadInput, RequestError
from prunella.model.batches import Listed, check_batches, described, listed, trainable
from prunella.model.forward import inputs_of
from prunella.model.trees import tensors
from prunella.types import Inputs, Loss

MOST = 128
"""Largest number of batches used."""


@dataclass(frozen=True)
class Batches:
    """fit: for statistics, least squares and training. held_out: for evaluation, with other samples. note: a remark if
    data is not used, or is used twice; empty otherwise. every: all batches in order, for their numbers in messages."""

    fit: tuple[Any, ...]
    held_out: tuple[Any, ...]
    note: str = ""
    every: Listed = field(default_factory=Listed, repr=False)

    @property
    def parts(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The data as part of an identity."""
        return self.fit, self.held_out


def split(model: nn.Module, data: Iterable[Any], loss: Loss | None, example: Inputs | None = None) -> Batches:
    """A quarter of the batches, or of the samples of the only batch, is held out.

    Without a loss, only the inputs of a batch of inputs and labels are used. example: has an axis of samples, as the
    batches must have. Errors: RequestError without batches, and for samples; BadInput for NaN or infinity in a batch.
    """
    check_batches(data)
    given = listed(itertools.islice(data, MOST + 1))
    note = f"only the first {MOST} batches are used" if len(given) > MOST else ""
    every = listed(trainable(batch if loss else inputs_of(model, batch)) for batch in given[:MOST])
    if loss is None:  # a loss itself selects the inputs of a batch
        _check_axis(every[0], example, isinstance(data, Dataset) and not isinstance(data, IterableDataset))
        check_finite(every)
    if len(every) > 1:
        fit = tuple(batch for number, batch in enumerate(every) if number % 4 != 1)
        return Batches(fit, tuple(batch for number, batch in enumerate(every) if number % 4 == 1), note, every)
    count = size(every[0])
    if count < 2 or not all(tensor.shape[0] == count for tensor in tensors(every[0]) if tensor.dim()):
        return Batches(tuple(every), tuple(every), "nothing is held out: the only batch cannot be split", every)
    at = count - max(1, count // 4)
    return Batches((part(every[0], 0, at),), (part(every[0], at, count),), note, every)


def _check_axis(batch: Any, example: Inputs | None, of_samples: bool) -> None:
    """Errors: RequestError for a sample in place of a batch: a row of the example, or one axis fewer in a dataset."""
    pairs = [(one.shape, other.shape) for one, other in zip(tensors(batch), tensors(example), strict=False)]
    short = [len(one) + 1 == len(other) and (of_samples or one == other[1:]) for one, other in pairs]
    if pairs and all(short):
        raise RequestError(
            "data= holds samples, not batches",
            f"its first entry is {described(batch)}, the example inputs are {described(example)}",
            "pass a loader, as torch.utils.data.DataLoader(data, batch_size=32)",
        )


def check_finite(every: Iterable[Any]) -> None:
    """Errors: BadInput names the first batch with NaN or infinity; attention masks may hold minus infinity."""
    for number, batch in enumerate(every):
        for tensor in (tensor for tensor in tensors(batch) if tensor.is_floating_point() or tensor.is_complex()):
            bad = tensor.isnan() | (tensor.isinf() if tensor.is_complex() else tensor.isposinf())
            if count := int(bad.sum()):
                why = f"{count} of its values are NaN or infinite; it is {described(batch)}"
                raise BadInput(f"batch {number} of data= is not finite", why, "fix the data, or leave this batch out")


def check_outputs(output: Any, batch: Any, every: Listed) -> None:
    """Errors: BadInput if the dense model gives NaN for a finite batch: nothing can be fitted to such outputs.

    Infinite outputs are accepted: models mask logits with minus infinity.
    """
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors(output)):
        place = every.place(batch)
        which = f"batch {place[0]} of data=" if place else "a batch of data="
        why = f"the model gives NaN for it; it is {described(batch)}"
        raise BadInput(f"the outputs for {which} are not finite", why, "check the weights of the model and the batch")


def first(batches: Sequence[Any], samples: int) -> tuple[Any, ...]:
    """The first batches with `samples` samples in total, at least one batch; the last one is cut."""
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
    """Samples `start` to `stop` of a batch: tensors with one entry per sample are sliced, other values are shared."""
    count = size(batch) if count is None else count
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: part(value, start, stop, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [part(value, start, stop, count) for value in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
