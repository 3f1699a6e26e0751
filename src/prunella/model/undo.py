"""Functions that restore the state of a model after a run: buffers, gradients, plain attributes and their contents.

Each function takes the present state and returns functions that restore it; `model/state.py` calls them.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from prunella.model.beside import CONTAINERS, is_same, undo_numbers, values_beside
from prunella.model.executed import is_source
from prunella.model.unread import is_elsewhere, is_empty, slots_of, unread

_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "training"})

Undo = Callable[[], None]


@contextmanager
def writable(tensor: Tensor) -> Iterator[None]:
    """Inside, the values of a tensor can be written, also if it was made in `torch.inference_mode()`."""
    guard = torch.inference_mode() if tensor.is_inference() else nullcontext()
    with guard, torch.no_grad():
        yield


def gradient_undo(parameter: nn.Parameter) -> Undo:
    required, grad = parameter.requires_grad, parameter.grad

    def undo() -> None:
        if parameter.requires_grad != required:  # tensors of the inference mode refuse to be set at all
            parameter.requires_grad_(required)
        parameter.grad = grad

    return undo


def buffer_undos(model: nn.Module) -> list[Undo]:
    return [
        _buffer(module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def parameter_undos(model: nn.Module) -> list[Undo]:
    """Undo writes of the user's own `train` methods to parameters."""
    own_train = [module for module in model.modules() if type(module).train is not nn.Module.train]
    parameters = {id(parameter): parameter for module in own_train for parameter in module.parameters()}
    return [value_of(parameter, _held) for parameter in parameters.values()]


_held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Values of parameters that guards store, by the id of the parameter, which lives as long as the value."""


def _buffer(module: nn.Module, name: str, buffer: Tensor) -> Undo:
    value = value_of(buffer)

    def undo() -> None:
        module._buffers[name] = buffer
        value()

    return undo


def value_of(tensor: Tensor | None, held: MutableMapping[int, Tensor] | None = None) -> Undo:
    """Undo writes into a tensor. A tensor on the meta device has no values to restore.

    held: a nested guard shares the value stored by the outer guard, if the tensor still has it: otherwise each guard
    would add a copy of a language model to the memory.
    """
    if tensor is None or tensor.device.type == "meta":
        return lambda: None
    outer = None if held is None else held.get(id(tensor))
    before = outer if outer is not None and _equal(tensor, outer) else tensor.detach().clone()
    if held is not None:
        held[id(tensor)] = before

    def undo() -> None:
        if not _equal(tensor, before):
            with writable(tensor):
                if tensor.shape != before.shape:  # an observer gets its size from the first data
                    tensor.resize_(before.shape)
                tensor.copy_(before)

    return undo


def _equal(tensor: Tensor, before: Tensor) -> bool:
    try:
        return torch.equal(tensor, before)
    except (RuntimeError, TypeError):  # layouts that torch does not compare
        return False


def attribute_undos(model: nn.Module) -> list[Undo]:
    seen = set(unread(model))
    undos = [_plain(vars(module), seen) for module in model.modules()]
    undos += undo_numbers(model)
    return [*undos, *(undo for value in values_beside(model) for undo in _undos_of(value, seen))]


def _plain(attributes: dict[str, Any], seen: set[int]) -> Undo:
    """Undo changes of plain attributes, so that no cache remains after a run. seen: values restored elsewhere."""
    held = attributes.copy()
    before = {key: value for key, value in held.items() if key not in _MACHINERY}
    hooks = [value for value in before.values() if is_empty(value)]
    undos = [undo for value in before.values() if not is_empty(value) for undo in _undos_of(value, seen)]

    def undo() -> None:
        if not is_same(attributes, held):
            for key in [key for key in attributes if key not in before and key not in _MACHINERY]:
                del attributes[key]
            attributes.update(before)
        for value in hooks:
            if not is_empty(value):
                value.clear()
                getattr(value, "__dict__", value).clear()
        for restore in undos:
            restore()

    return undo


def _undos_of(value: Any, seen: set[int], depth: int = 0) -> Iterator[Undo]:
    """Functions that restore the contents of a value; most values have none.

    Objects and containers in it are restored too, such as the dictionary of a cache.
    """
    if type(value) in _ATOMS or id(value) in seen or is_elsewhere(value):
        return
    seen.add(id(value))
    contents: Iterable[Any] = ()
    if type(value) in CONTAINERS:
        yield _content_of(value)
        contents = value.values() if isinstance(value, dict) else value
    if isinstance(value, Tensor):
        yield value_of(value)
    if _is_plain_object(value):
        yield _content_of(vars(value))
        contents = vars(value).values()
    slots = _slots_of(value)
    if slots:
        yield _slots_undo(value, slots)
        contents = slots.values()
    if isinstance(value, torch.Generator):
        yield _state_of(value)
    for item in list(contents) if depth < _DEPTH else ():
        if not isinstance(item, Tensor | nn.Module):  # their content is large
            yield from _undos_of(item, seen, depth + 1)


_ATOMS = frozenset({type(None), bool, int, float, str, tuple, type, FunctionType, MethodType})
_DEPTH = 3
"""Depth to which objects in attributes are restored."""


def _slots_of(value: object) -> dict[str, Any]:
    """The values in the `__slots__` of an object of a user's class."""
    plain = isinstance(value, Tensor | ModuleType) or not is_source(_file_of(type(value)))
    return {} if plain else slots_of(value)


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<"


def _slots_undo(value: object, slots: dict[str, Any]) -> Undo:
    def undo() -> None:
        for name, before in slots.items():
            if getattr(value, name, None) is not before:
                object.__setattr__(value, name, before)

    return undo


def _is_plain_object(value: object) -> bool:
    """Whether a value is an object with attributes, such as a configuration or a record of features."""
    excluded = isinstance(value, nn.Module | Tensor | type | ModuleType) or callable(value)
    return not excluded and type(getattr(value, "__dict__", None)) is dict


def _state_of(generator: torch.Generator) -> Undo:
    before = generator.get_state()

    def undo() -> None:
        generator.set_state(before)

    return undo


def _content_of(container: Any) -> Undo:
    """Undo insertions into and removals from a list, dictionary or set."""
    before = container.copy()

    def undo() -> None:
        if _differs(container, before):
            container.clear()
            container.extend(before) if isinstance(container, list | deque) else container.update(before)

    return undo


def _differs(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, set):
        return bool(container != before)
    if isinstance(container, dict):
        return any(key not in container or container[key] is not kept for key, kept in before.items())
    return any(now is not kept for now, kept in zip(container, before, strict=True))
