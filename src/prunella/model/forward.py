"""Forward passes on one batch, and the tensors of their outputs.

With `loss(model, batch)` from the user, the library runs the model only through this function. Otherwise the type of
the batch decides: a mapping gives keyword arguments, a tuple positional arguments, anything else the single argument.
Loaders often give inputs and labels: a model with one argument gets the first entry of a tuple or a list. The model
runs on a copy of the batch, which it may change in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import is_dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.model.batches import data_errors, described
from prunella.model.trees import attributes, own, tensors
from prunella.model.unwrap import unwrap

Outputs = Callable[[nn.Module, Any], Any]
"""A function of (model, batch) that returns the model's output."""


def forward(model: nn.Module, batch: Any, *, copy: bool = True) -> Any:
    """Run `model` on `batch`: mapping -> `model(**batch)`, tuple -> `model(*batch)`, else `model(batch)`.

    Of a tuple or a list of several entries a model with one argument gets the first: the others are labels. A list is
    first tried as the argument itself. copy: off where the batch is a copy already and the copy would be measured.
    Errors: RequestError if the arguments do not fit the model.
    """
    if not copy:
        return _forward(model, batch)
    with data_errors(model, batch):
        return _forward(model, own(batch))


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, list):
        return _of_list(model, batch)
    if isinstance(batch, Mapping):
        return _call(model, batch, **batch)
    if isinstance(batch, tuple):
        return _forward(model, batch[0]) if _labeled(model, batch) else _call(model, batch, *batch)
    return model(batch)


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors that `model` returns for `batch`, also in objects, iterators and generators; sparse ones as dense."""
    outputs = returned(model, forward(model, batch))
    return [tensor.to_dense() if tensor.layout in _SPARSE else tensor for tensor in outputs]


_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def returned(model: nn.Module, output: Any) -> list[Tensor]:
    """The tensors in an output of `model`. Iterators are consumed, so this works once per output.

    State that a model passes to its next call, such as a cache of keys and values, is not an output: see `states`.
    """
    return tensors(output, consume=True, without=states(model, output))


def states(model: nn.Module, output: Any) -> list[object]:
    """Objects in an output that a module of the model accepts as an optional argument of the same name.

    Tensors, containers and dataclasses always count as outputs.
    """
    named = {**attributes(output), **(output if isinstance(output, Mapping) else {})}
    opaque = {name: value for name, value in named.items() if _opaque(value)}
    if not opaque:
        return []
    kinds = {type(module) for module in model.modules()}
    optional = {name for kind in kinds for name in _optional(kind.forward)}
    return [value for name, value in opaque.items() if name in optional]


def _opaque(value: object) -> bool:
    shown = isinstance(value, Tensor | Mapping | Sequence | Set | Iterator | int | float | None)
    return not shown and not is_dataclass(value) and not callable(value)


@cache
def _optional(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of a `forward` that may be None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(parameter.name for parameter in parameters if parameter.default is None)


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """The part of a batch that the model accepts, on which `forward` gives the same without a trial."""
    if isinstance(batch, tuple) and _labeled(model, batch):
        return inputs_of(model, batch[0])
    if not isinstance(batch, list):
        return batch
    seen: list[tuple[Any, ...]] = []
    handle = model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    with handle:
        _of_list(model, batch)
    return seen[-1][0] if len(seen[-1]) == 1 else seen[-1]


def run(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """`loss(model, batch)`, or `forward` without a loss."""
    with data_errors(model, batch, name="a batch of data=" if loss is None else ""):
        return forward(model, batch) if loss is None else loss(model, own(batch))


def _of_list(model: nn.Module, batch: list[Any]) -> Any:
    try:
        return model(batch)
    except (TypeError, AttributeError) as error:  # what torch and a module raise for a list in place of a tensor
        if _labeled(model, batch):
            return _forward(model, batch[0])
        if len(batch) > 1 and _arguments(model) == (len(batch), len(batch)):
            return model(*batch)
        raise _misfit(batch, f"{type(error).__name__}: {error}") from error


def _call(model: nn.Module, batch: Any, /, *args: Any, **kwargs: Any) -> Any:
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(unwrap(model, sharded=True).forward).bind(*args, **kwargs)
        except TypeError as misfit:
            raise _misfit(batch, str(misfit)) from error
        except ValueError:  # a scripted module has no signature
            pass
        raise


def _misfit(batch: Any, why: str) -> RequestError:
    return RequestError(
        f"the model cannot be called on a batch of type {type(batch).__name__}",
        f"{why}; the batch is {described(batch)}",
        "pass loss=, for example loss=lambda model, batch: model(batch[0]).sum(), or a loader of the inputs alone",
    )


def _labeled(model: nn.Module, batch: tuple[Any, ...] | list[Any]) -> bool:
    """Whether only the first entry of a batch can be an input, as the model takes a single argument."""
    return len(batch) > 1 and isinstance(batch[0], Tensor | Mapping) and _arguments(model)[1] == 1


def _arguments(model: nn.Module) -> tuple[int, int | None]:
    """The least and the largest number of positional arguments of a model; None for any number, or unknown."""
    try:
        parameters = inspect.signature(unwrap(model, sharded=True).forward).parameters.values()
    except (ValueError, TypeError):
        return 0, None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    return required, None if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output. `NotSupported` if it has no tensor."""
    outputs = tensors(output)
    if not outputs:
        raise NotSupported(
            f"the model returned {type(output).__name__} without a tensor",
            "there is none in its items and attributes",
            "wrap the model so that it returns its tensors",
        )
    return outputs[0]


class Logits(NamedTuple):
    """An output that the model itself calls logits: `(..., classes)`."""

    logits: Tensor


def judged(output: Any, batch: Any) -> Tensor | Logits:
    """The tensor in an output by which two models are compared; it has an axis of samples.

    The logits, if an attribute or a key has this name and there are several classes; otherwise the first floating
    tensor with as many rows as the batch, otherwise the first one with an axis. A scalar loss in the output is never
    taken. A tensor with a single axis is one row. Errors: NotSupported if there is none.
    """
    if isinstance(output, Logits):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.dim() > 1 and named.shape[-1] > 1:  # one class has no softmax
        return Logits(named)
    rows = {tensor.shape[0] for tensor in tensors(batch) if tensor.dim()}
    candidates = [tensor for tensor in tensors(output) if tensor.dim()]
    if not candidates:
        first_tensor(output)  # raises if there is no tensor
        raise NotSupported(
            f"the model returned {type(output).__name__} with only single numbers",
            "two models are compared by outputs with an axis of samples, not by a loss",
            "leave labels out of the batches, or return the outputs with the loss",
        )
    floating = [tensor for tensor in candidates if tensor.is_floating_point()]
    tensor = next((tensor for tensor in floating if tensor.shape[0] in rows), (floating or candidates)[0])
    return tensor if tensor.dim() > 1 else tensor[None, None]  # two axes in front: the numbers are not classes


def judged_by(run: Outputs) -> Outputs:
    """`run`, reduced to the tensor of `judged`."""
    return lambda model, batch: judged(run(model, batch), batch)


def real_tokens(batch: Any) -> Tensor | None:
    """The mask of tokens that are not padding, flattened, by the `attention_mask` `(samples, tokens)` of a batch.

    None if the batch has no such mask, or nothing is padding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    real = mask.flatten() != 0
    return None if bool(real.all()) else real


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
