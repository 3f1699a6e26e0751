"""Batches of data with their numbers: an error of a model names the batch, and describes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from prunella.errors import BadInput, PruningError, RequestError, out_of_resources
from prunella.model.trees import each, tensors
from prunella.model.user_code import advice_on, raised_by_user, told


class BatchIterator(Iterator[Any]):
    """Iterates over the batches of some data, with the number of the present one and a description of the first."""

    def __init__(self, data: Iterable[Any], *, required: bool = True) -> None:
        self._data, self._required = data, required
        self._stream: Iterator[Any] | None = None
        self.number, self.batch, self.first = -1, None, ""
        _alive.add(self)

    def __next__(self) -> Any:
        if self._stream is None:  # lazily: a loader draws random numbers at its start
            self._stream = iter(self._data)
        try:
            self.batch = next(self._stream)
        except StopIteration:
            if self.number < 0 and self._required:
                raise no_batches() from None
            raise
        self.number += 1
        self.first = self.first or described(self.batch)
        _check_samples(self.batch, self.number)
        return self.batch

    def place(self, batch: object) -> tuple[int, str] | None:
        """The number of a batch and a description of the first one; None if it is not the present one."""
        return (self.number, self.first) if batch is self.batch and self.number >= 0 else None


class Listed(list[Any]):
    """All batches of some data, in a list that gives their numbers."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def place(self, batch: object) -> tuple[int, str] | None:
        """The number of a batch and a description of the first one; None if it is not in the list."""
        number = next((number for number, one in enumerate(self) if one is batch), None)
        return None if number is None else (number, described(self[0]))


_alive: WeakSet[BatchIterator | Listed] = WeakSet()


def batches(data: Iterable[Any], *, required: bool = True) -> BatchIterator:
    """The batches of `data`. Errors: RequestError if `required` and there are none, BadInput for an empty batch."""
    return BatchIterator(data, required=required)


def check_batches(data: object) -> None:
    """Errors: RequestError for a single batch, with rows that would count as batches, and for other objects."""
    todo = "for a single batch pass data=[batch]"
    if isinstance(data, Tensor | Mapping | str):
        raise RequestError(f"data= is one {type(data).__name__}", "an iterable of batches is needed", todo)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):  # a Dataset has no __iter__
        why = f"it is {data!r:.80}, and an iterable of batches is needed"
        raise RequestError(f"data= is not an iterable of batches but of type {type(data).__name__}", why, todo)


def listed(data: Iterable[Any]) -> Listed:
    """All batches of `data`. Errors: as `batches`."""
    every = Listed(BatchIterator(data))
    _alive.add(every)
    return every


def trainable(batch: Any) -> Any:
    """The batch with copies of tensors made in `torch.inference_mode()`, which do not allow gradients."""
    inference = any(tensor.is_inference() for tensor in tensors(batch))
    return each(batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor) if inference else batch


@contextmanager
def data_errors(model: nn.Module, batch: object, *, name: str = "") -> Iterator[None]:
    """Turns an error of the model in the body into a BadInput that names and describes the batch.

    `except` also catches it as the model's own error. Errors of prunella, of the user's functions outside the model,
    and a lack of memory pass. name: of a batch without a `BatchIterator`, such as a part of a batch; without a name its
    errors pass.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:
        place = next((position for known in list(_alive) if (position := known.place(batch)) is not None), None)
        label = name or place
        if not label or out_of_resources(error) or not _of_model(error, model) or not raised_by_user(error):
            raise
        number, first = place or (0, "")
        name = f"batch {number} of data=" if place else name
        why = f"it is {described(batch)}{f', batch 0 was {first}' if number else ''}; the model {_weight(model)}"
        give = (
            "give batches with the shapes, types and keys of the model's inputs, or loss= to run the model on a batch"
        )
        what, todo = f"the model does not run on {name}", advice_on(error, give)
        raise _caught_as(type(error))(what, f"{why}; {told(error)}", todo) from error


def described(batch: object) -> str:
    """`a dict of input_ids 2x16 int64`, `8x3x8x8 float32`, `a tuple of 8x3 float32, str`."""
    if isinstance(batch, Tensor):
        return f"{'x'.join(map(str, batch.shape)) or 'one number'} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        parts = [f"{key} {described(value)}" for key, value in batch.items()]
    elif isinstance(batch, tuple | list):
        parts = [described(value) for value in batch]
    else:
        return type(batch).__name__
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return f"a {type(batch).__name__} of {', '.join([*parts[:_SHOWN], *more]) or 'nothing'}"


_SHOWN = 6
"""Parts of a batch that are named."""


def _weight(model: nn.Module) -> str:
    """`starts with the weight 0.weight 16x3x3x3 float32`: what the inputs must fit."""
    weight = next(((name, value) for name, value in model.named_parameters() if value.dim() > 1), None)
    return f"starts with {weight[0]} {described(weight[1])}" if weight else "has no weights"


def _of_model(error: BaseException, model: nn.Module) -> bool:
    """Whether the model was running: its call is among the frames of the error."""
    step = error.__traceback__
    inside = {id(module) for module in model.modules()}
    while step is not None:
        if step.tb_frame.f_code.co_name == "_call_impl" and id(step.tb_frame.f_locals.get("self")) in inside:
            return True
        step = step.tb_next
    return False


def _caught_as(kind: type[Exception]) -> type[BadInput]:
    """A BadInput that `except` also catches as an error of that kind."""
    base = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    try:
        return BadInput if issubclass(BadInput, base) else type("BadInput", (BadInput, base), {})
    except TypeError:  # an error of the system, with another layout
        return BadInput


class NoBatches(BadInput, RequestError):
    """Data without a batch: bad input, and an invalid request."""


def no_batches() -> NoBatches:
    """The error for data without a batch."""
    return NoBatches(
        "data= holds no batches",
        "the loader is empty, or data= is a generator that is exhausted",
        "pass a list of batches or a DataLoader",
    )


def _check_samples(batch: object, number: int) -> None:
    shaped = [tensor for tensor in tensors(batch) if tensor.dim()]
    if shaped and all(not tensor.shape[0] for tensor in shaped):
        why = f"it is {described(batch)}"
        raise BadInput(f"batch {number} of data= has no samples", why, "leave empty batches out")
