"""Forward passes on one batch, and the tensors of their outputs.

With `loss(model, batch)` from the user, the library runs the model only through this function. Otherwise the type of
the
batch decides: a mapping gives keyword arguments, a tuple positional arguments, anything else the single argument.
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
    """All tensors of an output in order, from nested tuples, lists and mappings; other values are ignored."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors(value)]
    return []


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output. `NotSupported` if it has no tensor."""
    outputs = tensors(output)
    if not outputs:
        raise NotSupported(
            f"the model returned {type(output).__name__} without a tensor",
            "only tuples, lists and mappings are searched for tensors",
            "wrap the model so that it returns one of these",
        )
    return outputs[0]


def batches(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of `data`. `RequestError` if there are none."""
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise RequestError(
            "data= holds no batches",
            "the loader is empty, or data= is a generator that is exhausted",
            "pass a list of batches or a DataLoader",
        )


def samples(batch: Any) -> Iterator[Any]:
    """A batch as batches of one sample: tensors with axes are split along the first, other values are shared."""
    batched = [tensor for tensor in tensors(batch) if tensor.dim()]
    sizes = {tensor.shape[0] for tensor in batched}
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
