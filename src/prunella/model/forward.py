"""How the library runs a model on one batch, and reads tensors out of what comes back. Written once, used everywhere.

Where the user gives `loss(model, batch)`, that is the only way the model is run; otherwise the shape of the batch
decides how it is passed: a mapping as keywords, a tuple as positions, anything else as the one argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError

Outputs = Callable[[nn.Module, Any], Any]
"""A function of (model, batch) that returns what the model returns."""


def forward(model: nn.Module, batch: Any) -> Any:
    """Run `model` on `batch`: mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output in order: of a tensor, tuple, list or mapping, nested; anything else is ignored."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors(value)]
    return []


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output. `NotSupported` if it holds none."""
    found = tensors(output)
    if not found:
        raise NotSupported(
            f"the model returned {type(output).__name__} without a tensor",
            "tensors are looked for in tuples, lists and mappings",
            "wrap the model so that it returns one of these",
        )
    return found[0]


def batches(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of `data`. `RequestError` if there are none."""
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise RequestError(
            "data= holds no batches",
            "the loader is empty, or it is a generator that was used up before",
            "pass a list of batches or a DataLoader",
        )


def samples(batch: Any) -> Iterator[Any]:
    """A batch as batches of one: every tensor in it that has axes is split along its first one, the rest is shared."""
    found = [tensor for tensor in tensors(batch) if tensor.dim()]
    sizes = {tensor.shape[0] for tensor in found}
    if len(sizes) != 1:
        raise RequestError(
            "this batch cannot be split into samples",
            f"the first axes of its tensors have {', '.join(map(str, sorted(sizes))) or 'no'} positions",
            "pass batches of one sample, or tensors whose first axis numbers the samples",
        )
    for number in range(sizes.pop()):
        yield _sample(batch, number)


def _sample(batch: Any, number: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[number : number + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _sample(value, number) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_sample(value, number) for value in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
