"""Trees of tensors: any input or output of a model, from one tensor to objects of any class.

`tensors` lists the tensors of a tree, `each` changes them in the same order, `own` copies a batch.
"""

from __future__ import annotations

import copy
import enum
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.model.executed import is_source
from prunella.model.unread import is_elsewhere

_ATOMS = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        type,
        enum.Enum,
        ModuleType,
        np.ndarray,
        np.generic,
    ),
    *(torch.dtype, torch.device, torch.Generator, torch.layout, torch.memory_format, nn.Module, BuiltinFunctionType),
    *(np.ndarray, np.generic),
)
"""Types without tensors inside; the tensors of a module are its own."""
_SIMPLE = frozenset({type(None), bool, int, float, str})
_PLAIN = frozenset({dict, list, tuple, set, frozenset})
Done = dict[int, tuple[Any, Any]]

_ENDLESS = 2_000
"""Iterators with more items count as endless."""


def tensors(tree: Any, *, consume: bool = False, without: Iterable[object] = ()) -> list[Tensor]:
    """All tensors of a tree, in order, from containers, views, objects of any class, and closures of functions.

    consume: also consume iterators and generators. This runs them, so it is for the outputs of a model.
    without: objects that are not searched.
    """
    walk = _Walk(partial(items, consume=consume), {id(value): value for value in without})
    walk.collect(tree, again=True)
    return walk.collected


def stored_tensors(tree: Any) -> list[Tensor]:
    """The tensors that an attribute holds, without running code of its classes and without objects of other worlds.

    A container of a class that iterates by code of its own, such as a dataset that loads files, is searched by its
    attributes.
    """
    walk = _Walk(_stored_items, {}, stored=True)
    walk.collect(tree, again=True)
    return walk.collected


def first(tree: Any) -> Tensor | None:
    """The first tensor of a tree; None if it has none."""
    return next(iter(tensors(tree)), None)


@dataclass
class _Walk:
    """path: the values around the present one, and all objects so far. stored: without objects of other worlds."""

    items: Callable[[Any], list[Any]]
    path: dict[int, Any]
    stored: bool = False
    collected: list[Tensor] = field(default_factory=list)
    known: set[int] = field(default_factory=set)

    def collect(self, value: Any, *, again: bool) -> None:
        """again: count a tensor also if it was reached before."""
        if self.stored and is_elsewhere(value):
            return
        if isinstance(value, Tensor) and (again or id(value) not in self.known):
            self.known.add(id(value))
            self.collected.append(value)
        bare = isinstance(value, Tensor) and not _noted(value)
        if bare or type(value) in _SIMPLE or id(value) in self.path or isinstance(value, _ATOMS):
            return
        self.path[id(value)] = value  # which keeps its address in use
        for item in self.items(value):
            self.collect(item, again=again)
        for item in attributes(value).values():
            # A container may also store its items in attributes, and an object may be reached by several paths.
            self.collect(item, again=False)
        if type(value) in _PLAIN:
            del self.path[id(value)]


def items(value: Any, *, consume: bool = False) -> list[Any]:
    """The items of a container, or the objects that a function refers to."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Set) and not isinstance(value, MappingView):
        return sorted(value, key=_form)
    if isinstance(value, MappingView | Sequence) or type(value).__name__ == "deque":
        return list(value)
    if isinstance(value, Iterator) and consume:
        return list(_taken(value))
    return _held(value)


def _stored_items(value: Any) -> list[Any]:
    """The same of plain containers and their subclasses, and of others without code of their own to iterate."""
    if isinstance(value, dict):
        return list(dict.values(value))
    kind = next((kind for kind in (list, tuple, deque) if isinstance(value, kind)), None)
    if kind is not None:
        return list(kind.__iter__(value))
    methods = (getattr(type(value), name, None) for name in ("__iter__", "__getitem__", "__len__", "values"))
    own = any(isinstance(method, FunctionType) and is_source(method.__code__.co_filename) for method in methods)
    return [] if own else items(value)


def attributes(value: Any) -> dict[str, Any]:
    """The plain attributes of an object, with or without `__slots__`. Objects of the standard library have none."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (FunctionType, MethodType, *_ATOMS)) or _standard(value):
        return {}
    own = dict(_stored(value))
    for base in () if isinstance(value, Tensor) else kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                own[name] = getattr(value, name)
    return own


def each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed, in the order of `tensors`. Iterators, views and functions are kept."""
    return _changed(tree, change, {})


def own(batch: Any) -> Any:
    """A copy of a batch, which a model may change in place. Shared tensors of the batch are shared in the copy.

    A subclass of `Tensor` becomes a plain tensor, unless it has its own kind of storage.
    """
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = plain_tensor(tensor).clone()
        return copies[id(tensor)]

    return each(batch, copied)


def plain_tensor(tensor: Tensor) -> Tensor:
    """The tensor without its subclass, where the subclass only adds methods and attributes."""
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _changed(value: Any, change: Callable[[Tensor], Tensor], done: Done, *, again: bool = True) -> Any:
    """done: address -> (value, changed value). again: as in `_collect`, so that both take the tensors in one order."""
    if id(value) in done and not (again and (isinstance(value, Tensor) or type(value) in _PLAIN)):
        return done[id(value)][1]
    done[id(value)] = value, value  # the way back of a cycle
    changed: Any
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, _ATOMS):
        changed = value
    elif type(value) in _PLAIN:
        new_items = [_changed(item, change, done, again=again) for item in items(value)]
        changed = dict(zip(value, new_items, strict=True)) if type(value) is dict else type(value)(new_items)
    else:
        changed = _rebuilt(value, change, done, again=again)
    done[id(value)] = value, changed
    return changed


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor], done: Done, *, again: bool) -> Any:
    """A shallow copy of a container or an object of any class with its parts changed; itself if nothing changes."""
    old_items, old_own = items(value), attributes(value)
    new_items = [_changed(item, change, done, again=again) for item in old_items]
    new_own = {name: _changed(item, change, done, again=False) for name, item in old_own.items()}
    other_items = any(a is not b for a, b in zip(old_items, new_items, strict=True))
    if not other_items and all(old_own[name] is new_own[name] for name in old_own):
        return value
    own_changed = {name: item for name, item in new_own.items() if item is not old_own[name]}
    if not own_changed or isinstance(value, MutableMapping | tuple | list):
        rebuilt = _with_items(value, new_items) if other_items else copy.copy(value)
    else:
        rebuilt = copy.copy(value)  # its items come from its attributes
    for name, item in own_changed.items() if rebuilt is not value else ():
        set_attribute(rebuilt, name, item)
    return rebuilt


def _with_items(value: Any, new_items: list[Any]) -> Any:
    if isinstance(value, MutableMapping):
        rebuilt = copy.copy(value)
        for key, item in zip(value, new_items, strict=True):
            rebuilt[key] = item
        return rebuilt
    if isinstance(value, Mapping):
        return dict(zip(value, new_items, strict=True))
    if hasattr(value, "_fields"):
        return type(value)(*new_items)
    if isinstance(value, Sequence | Set) and not isinstance(value, MappingView):
        return type(value)(new_items)  # type: ignore[call-arg]
    return value


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set a plain attribute, also of a frozen dataclass and of an object that checks assignments."""
    stored = _stored(owner)
    if name in stored:
        stored[name] = value
    else:
        object.__setattr__(owner, name, value)


def _stored(value: Any) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = vars(value)
    except TypeError:  # it has slots alone
        return {}
    return stored


def _held(value: Any) -> list[Any]:
    """The objects that a function, a method or a partial call refers to."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return []


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _taken(iterator: Iterator[Any]) -> Iterator[Any]:
    for number, item in enumerate(iterator):
        if number >= _ENDLESS:
            what = f"the model returned a {type(iterator).__name__} of more than {_ENDLESS} items"
            raise NotSupported(what, "it may never end", "return a list of the outputs")
        yield item


def _form(value: object) -> tuple[str, str]:
    """An order of the members of a set that does not depend on their addresses."""
    return (str(value.dtype), str(tuple(value.shape))) if isinstance(value, Tensor) else (type(value).__name__, "")


def _noted(tensor: Tensor) -> bool:
    """Whether a plain tensor has additional attributes."""
    return type(tensor) is Tensor and bool(getattr(tensor, "__dict__", None))


def _standard(value: object) -> bool:
    kind = type(value)
    if isinstance(value, Mapping | Sequence | SimpleNamespace):
        return False
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind.__module__ != "__main__"
