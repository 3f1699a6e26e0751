"""The scope of a function of the model's source: the values that it names, and the functions that it may call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prunella.model.executed import is_source
from prunella.model.trees import items

_DEPTH = 3
"""Most nested functions through which a size or a value is followed."""
_MOST = 32
"""Most functions that are searched, those named by the running function first."""
_NO_HOLDERS = (nn.Module, Tensor, type, FunctionType, property, staticmethod, classmethod)
_NO_METHODS = frozenset({FunctionType, type(None), bool, int, float, str, tuple, list, dict, set, torch.dtype})
"""Types with methods outside the model's source; methods of their subclasses may be inside."""
_CACHED = type(functools.lru_cache(len))


@dataclass(frozen=True)
class FunctionScope:
    """A function, running or not.

    space: its globals. owner: its first argument, if that is an object. local: its variables, cells and defaults.
    """

    code: CodeType
    space: Mapping[str, Any]
    owner: object
    local: tuple[Any, ...]
    given: tuple[Any, ...] = ()
    """Arguments and cells of a running function, defaults and cells of one that is not."""

    def named(self) -> Iterator[Any]:
        """Globals, locals, attributes of the owner and its class, and of objects there."""
        names, own = self.code.co_names, self._attributes()
        holders = [value for value in own if hasattr(value, "__dict__") and not isinstance(value, _NO_HOLDERS)]
        yield from (self.space[name] for name in names if name in self.space)
        yield from own
        yield from (attribute(holder, name) for holder in holders for name in names)
        yield from (value for value in self.local if isinstance(value, dict | set | frozenset))
        yield from (value for value in self.given if type(value) in (int, float))

    def containers(self) -> Iterator[tuple[str, dict[Any, Any] | list[Any] | tuple[Any, ...]]]:
        """Name -> dictionary, list or tuple that it names: of its owner, or a global."""
        for name in self.code.co_names:
            for value in (None if self.owner is None else attribute(self.owner, name), self.space.get(name)):
                if isinstance(value, dict | list | tuple):
                    yield name, value

    def callees(self) -> Iterator[FunctionScope]:
        """The functions of the model's source that it names, by themselves or as methods of what it names."""
        names = self.code.co_names
        seen = [self.owner, *self.local, *(self.space[name] for name in names if name in self.space)]
        for holder in (*seen, *self._attributes()):
            yield from _scope_of(holder, None)
            if type(holder) not in _NO_METHODS and not isinstance(holder, Tensor):
                for name in names:
                    yield from _scope_of(attribute(holder, name), holder)

    def _attributes(self) -> list[Any]:
        return [] if self.owner is None else [attribute(self.owner, name) for name in self.code.co_names]


def scopes(frame: FrameType) -> list[FunctionScope]:
    """The running function, and the functions of the source that it may call, each once, the nearest first."""
    code, local = frame.f_code, frame.f_locals
    names = (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_freevars)
    arguments = tuple(local[name] for name in names if name in local)
    near = [FunctionScope(code, frame.f_globals, owner_of(frame), tuple(local.values()), arguments)]
    known = {code: near[0]}
    for _ in range(_DEPTH):
        found: list[FunctionScope] = []
        for callee in (callee for scope in near for callee in scope.callees()):
            if callee.code not in known and len(known) < _MOST:
                known[callee.code] = callee
                found.append(callee)
        near = found
    return list(known.values())


def scopes_of(model: nn.Module) -> Iterator[FunctionScope]:
    """The forward pass of each module that comes from source of somebody's own."""
    for module in model.modules():
        yield from _scope_of(module.forward, module)


def owner_of(frame: FrameType) -> object:
    """The object of the running method: the first argument, whatever its name; None if it has no class of its own."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if hasattr(first, "__dict__") and not isinstance(first, Tensor | int) else None


def attribute(owner: object, name: str) -> Any:
    """An attribute of an object or of its class, read without running code of the model."""
    if isinstance(owner, nn.Module) and name in owner._modules:
        return owner._modules[name]
    value = inspect.getattr_static(owner, name, None)
    if isinstance(value, MemberDescriptorType) and not isinstance(owner, type):  # it reads a slot
        return getattr(owner, name, None)
    return value


def _scope_of(value: Any, owner: object) -> Iterator[FunctionScope]:
    """The function that a value is, if it belongs to the source of a model."""
    if isinstance(value, nn.Module) and next(value.parameters(), None) is None:
        value = value.forward
    bound: tuple[Any, ...] = ()
    if isinstance(value, functools.partial):
        value, bound = value.func, (*value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        value, owner = value.__func__, value.__self__
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if type(value) is _CACHED:
        value = value.__wrapped__
    if isinstance(value, FunctionType) and is_source(value.__code__.co_filename):
        held = (*items(value), *bound)
        yield FunctionScope(value.__code__, value.__globals__, owner, held, held)
