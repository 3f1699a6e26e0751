"""Guards of a model's state: one for training flags, one for everything that a run may change.

`mode` serves work that may change weights (recovery, in-place solvers), `untouched` serves inspection of a model.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from prunella.model.rng import seeded

log = logging.getLogger(__name__)

_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "training"})
_CONTAINERS = frozenset({dict, list, set, OrderedDict})
"""Types of attributes whose content is restored; hooks are in an `OrderedDict`."""

Undo = Callable[[], None]


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """Set every module of `model` to training or evaluation mode, then restore the flag of each module.

    Weights may change inside, also under the caller's autocast.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with _fresh_casts():
            yield model
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def untouched(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Run the body with `model` in evaluation mode, then restore all changes bit for bit, also after errors.

    Restored: training flags; buffers (running statistics, also where the model replaces them); plain attributes, and
    the content of dictionaries, lists, sets and tensors among them (caches, hooks); `requires_grad` and `.grad` of
    parameters; the random number generators of torch, CUDA, numpy and Python. Not restored: values of parameters.

    seed: of all generators in the body, so that a shuffling loader repeats its batches; None: not seeded.
    """
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(_without_fast_path())
        for parameter in model.parameters():
            stack.callback(_gradient(parameter))
        for undo in (*_buffers(model), *_attributes(model)):
            stack.callback(undo)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        yield


def losses_in_training_(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any] | None) -> bool:
    """Whether a loss that has just failed in evaluation mode exists in training mode; the model is then left in it.

    Detectors return their losses in training mode only. Modules that draw random numbers or keep statistics stay in
    evaluation mode. Call it inside a guard that restores the flags.
    """
    if loss is None:
        return False
    flags = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        module.training = not isinstance(module, _NormBase | _DropoutNd)
    try:
        loss(model, batch)
    except Exception:  # whatever a user's function raises: it fails in both modes
        for module, flag in flags:
            module.training = flag
        return False
    log.warning("the loss exists in training mode only: it runs in it, with norms and dropout in evaluation mode")
    return True


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Disable the cache of autocast, which keeps copies of weights after a change of the weights."""
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable the fused transformer layers of torch, which hide their weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _gradient(parameter: nn.Parameter) -> Undo:
    required, grad = parameter.requires_grad, parameter.grad

    def undo() -> None:
        parameter.requires_grad_(required)
        parameter.grad = grad

    parameter.grad = None  # so that a backward pass does not add to the caller's
    return undo


def _buffers(model: nn.Module) -> list[Undo]:
    return [
        _buffer(module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _buffer(module: nn.Module, name: str, buffer: Tensor) -> Undo:
    value = _value_of(buffer)

    def undo() -> None:
        module._buffers[name] = buffer
        value()

    return undo


def _value_of(tensor: Tensor | None) -> Undo:
    """Undo writes into a tensor. A tensor on the meta device has no values to restore."""
    if tensor is None or tensor.device.type == "meta":
        return lambda: None
    before = tensor.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            if not _equal(tensor, before):
                tensor.copy_(before)

    return undo


def _equal(tensor: Tensor, before: Tensor) -> bool:
    try:
        return torch.equal(tensor, before)
    except (RuntimeError, TypeError):  # layouts that torch does not compare
        return False


def _attributes(model: nn.Module) -> list[Undo]:
    return [_plain(vars(module)) for module in model.modules()]


def _plain(attributes: dict[str, Any]) -> Undo:
    """Undo changes of plain attributes, so that no cache remains after a run."""
    before = {key: value for key, value in attributes.items() if key not in _MACHINERY}
    contents = [_content_of(value) for value in before.values() if type(value) in _CONTAINERS]
    values = [_value_of(value) for value in before.values() if isinstance(value, Tensor)]

    def undo() -> None:
        for key in [key for key in attributes if key not in before and key not in _MACHINERY]:
            del attributes[key]
        attributes.update(before)
        for restore in (*contents, *values):
            restore()

    return undo


def _content_of(container: Any) -> Undo:
    """Undo insertions into and removals from a list, dictionary or set."""
    before = container.copy()

    def undo() -> None:
        if _differs(container, before):
            container.clear()
            container.extend(before) if type(container) is list else container.update(before)

    return undo


def _differs(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, set):
        return bool(container != before)
    if isinstance(container, dict):
        return any(key not in container or container[key] is not kept for key, kept in before.items())
    return any(now is not kept for now, kept in zip(container, before, strict=True))
