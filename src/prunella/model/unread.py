"""Large values on a model that no code of its forward pass names, such as a dataset or a trainer: no part of the model.

Copies share them, and no search for tensors or sizes walks through them.
"""

from __future__ import annotations

import dis
import logging
import socket
import subprocess
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    TracebackType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from prunella.model.executed import is_source

ELSEWHERE = (
    *(ModuleType, FrameType, TracebackType, CodeType, *weakref.ProxyTypes, weakref.ref),
    *(logging.Logger, logging.Handler, threading.Thread, socket.socket, subprocess.Popen),
    *(Dataset, DataLoader, Sampler, Optimizer),
)
"""Types of objects that are no state of a model, of whatever size: data, training, process."""
_LARGE = 500
"""Most objects in a value that is always searched. Numbers and texts are not counted: a configuration is always
searched, with however many names of classes."""
_NUMBERS = frozenset({type(None), bool, int, float, complex, str, bytes})
_MACHINERY = frozenset({"_parameters", "_buffers", "_modules"})
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, type, Tensor, nn.Module, np.ndarray, np.generic),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, FunctionType, MethodType, BuiltinFunctionType),
)
_SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset, deque)


def is_elsewhere(value: object) -> bool:
    """Whether a value is an object of another world; the type is asked, since a proxy pretends to be its referent."""
    return issubclass(type(value), ELSEWHERE)


def is_empty(value: object) -> bool:
    """Whether a value is an empty plain dictionary, like most attributes of a module: those for hooks."""
    return type(value) in (dict, OrderedDict) and not value and not getattr(value, "__dict__", None)


def unread(model: nn.Module) -> dict[int, Any]:
    """Identity -> value, of the large values in plain attributes that no code of the forward pass names."""
    large: dict[int, Any] = {}
    names: dict[int, set[str]] = {}
    small = set[int]()
    for module in model.modules():
        if type(module).__module__.startswith("torch."):  # such as a program, whose graph torch itself reads
            continue
        for name, value in vars(module).items():
            leaf = type(value) in weakref.ProxyTypes or isinstance(value, _LEAVES)  # a dead proxy refuses `isinstance`
            if leaf or name in _MACHINERY or id(value) in small or is_empty(value):
                continue
            if id(value) not in large and not _is_large(value):
                small.add(id(value))
                continue
            large[id(value)] = value
            names.setdefault(id(value), set()).add(name)
    if not large:
        return {}
    read = _read_by(model)
    return {} if read is None else {key: value for key, value in large.items() if not names[key] & read}


def parts_of(value: object) -> Iterator[Any]:
    """The items of a plain container and the attributes of any object, read without running code of their classes."""
    if isinstance(value, dict):
        yield from dict.values(value)
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            yield from kind.__iter__(value)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield from attributes.values()
    yield from slots_of(value).values()


def slots_of(value: object) -> dict[str, Any]:
    """The values in the `__slots__` of an object, read without running code of its class."""
    values: dict[str, Any] = {}
    for kind in type(value).__mro__:
        for name, entry in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(entry, MemberDescriptorType):
                with suppress(AttributeError):  # it is not set
                    values.setdefault(name, entry.__get__(value))
    return values


def _is_large(value: object) -> bool:
    seen, stack, count = set[int](), [value], 0
    while stack:
        part = stack.pop()
        if id(part) in seen or (is_elsewhere(part) and part is not value):
            continue
        seen.add(id(part))
        for inner in parts_of(part):
            count += type(inner) not in _NUMBERS
            if count > _LARGE:
                return True
            if not is_elsewhere(inner) and not isinstance(inner, _LEAVES):
                stack.append(inner)
    return False


def _read_by(model: nn.Module) -> frozenset[str] | None:
    """The names in the code that a forward pass may run; None if it may also read attributes by computed names."""
    classes: dict[type, None] = {}
    functions: dict[FunctionType, None] = {}
    for part in _hanging_on(model):
        functions.update(dict.fromkeys(_functions_in(part)))
        if isinstance(part, nn.Module) or not isinstance(part, _LEAVES):
            classes[type(part)] = None
    return _names_in(classes, functions)


def _hanging_on(model: nn.Module) -> Iterator[Any]:
    """The modules, and what is reached from their attributes: of each attribute the nearest `_LARGE` objects."""
    seen = {id(module) for module in model.modules()}
    for module in model.modules():
        yield module
        for value in (value for name, value in vars(module).items() if name not in _MACHINERY):
            todo, left = deque([value]), _LARGE
            while todo and left:
                part = todo.popleft()
                if type(part) in _NUMBERS or id(part) in seen or is_elsewhere(part):
                    continue
                seen.add(id(part))
                left -= 1
                yield part
                todo.extend(_held_by(part))


def _held_by(value: object) -> Iterator[Any]:
    """The parts of a value, and the objects that a function, a method or a partial call holds."""
    if isinstance(value, FunctionType):
        yield from (content for cell in value.__closure__ or () for content in _content_of(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif not isinstance(value, _LEAVES):
        yield from parts_of(value)


def _content_of(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def _functions_in(value: object) -> Iterator[FunctionType]:
    """The Python function in a callable."""
    if isinstance(value, partial):
        yield from _functions_in(value.func)
    if isinstance(value, MethodType):
        yield from _functions_in(value.__func__)
    if isinstance(value, staticmethod | classmethod):
        yield from _functions_in(value.__func__)
    if isinstance(value, property):
        yield from (function for access in (value.fget, value.fset) for function in _functions_in(access))
    if isinstance(value, FunctionType) and _is_own(value.__code__):
        yield value
    attributes = getattr(value, "__dict__", None)
    wrapped = attributes.get("__wrapped__") if type(attributes) is dict else None  # of a cached function
    if isinstance(wrapped, FunctionType) and _is_own(wrapped.__code__):
        yield wrapped


def _enclosed(function: FunctionType) -> Iterator[FunctionType]:
    """The functions in its closure, which may be itself."""
    for cell in function.__closure__ or ():
        yield from (inner for content in _content_of(cell) for inner in _functions_in(content))


def _is_own(code: CodeType) -> bool:
    """Whether code is of a user or a package: of a file, or typed into an interpreter."""
    path = code.co_filename
    return is_source(path) or (path.startswith("<") and not path.startswith("<frozen"))


def _names_in(classes: Iterable[type], functions: Iterable[FunctionType]) -> frozenset[str] | None:
    """The names in these functions, in the methods that run unnamed, and in all functions of a name that is read.

    It is found anew each time: a class, a file or a closure may have another function by now.
    """
    known = {base for kind in classes for base in kind.__mro__}
    methods = _methods_of(classes)
    todo = [*functions, *(method for name in methods if _runs_unnamed(name) for method in methods[name])]
    done, names = set[FunctionType](), set[str]()
    while todo:
        function = todo.pop()
        if function in done:
            continue
        done.add(function)
        todo += _enclosed(function)
        for code in _codes(function.__code__):
            new = _names_of(code)
            if new is None:
                return None
            names |= new
            todo += (method for name in new for method in methods.get(name, ()))
            todo += _named_outside(function.__globals__, code.co_names, known)
    return frozenset(names)


def _names_of(code: CodeType) -> frozenset[str] | None:
    """The names and texts in code; None if it computes names. A code never changes, so that each is read once."""
    if code not in _read_codes:
        texts = (constant for constant in code.co_consts if isinstance(constant, str))
        computed = code.co_name not in _OF_ATTRIBUTES and _computes_names(code)
        _read_codes[code] = None if computed else frozenset([*code.co_names, *texts])
    return _read_codes[code]


_read_codes: weakref.WeakKeyDictionary[CodeType, frozenset[str] | None] = weakref.WeakKeyDictionary()


def _methods_of(classes: Iterable[type]) -> dict[str, list[FunctionType]]:
    """Name -> the methods of this name in these classes and their bases."""
    methods: dict[str, list[FunctionType]] = {}
    for base in dict.fromkeys(base for kind in classes for base in kind.__mro__):
        for name, value in vars(base).items():
            methods.setdefault(name, []).extend(_functions_in(value))
    return methods


def _named_outside(space: dict[str, Any], names: Iterable[str], known: Set[type]) -> Iterator[FunctionType]:
    """The functions that names refer to in a file, in the files that it names, and in classes that it names."""
    values = [space[name] for name in names if name in space]
    files = [vars(value) for value in values if isinstance(value, ModuleType)]
    for value in (*values, *(file[name] for file in files for name in names if name in file)):
        yield from _functions_in(value)
        if isinstance(value, type) and value not in known:
            yield from (function for entry in vars(value).values() for function in _functions_in(entry))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


_OF_ATTRIBUTES = frozenset({"__getattribute__", "__getattr__", "__setattr__", "__delattr__"})
"""Methods whose names come from the code that reads or sets an attribute."""
_NEVER = frozenset(
    "__init__ __new__ __repr__ __str__ __del__ __reduce__ __reduce_ex__ __getstate__ __setstate__".split()
)
"""Methods between two underscores that no forward pass runs on an object that is there."""


def _runs_unnamed(name: str) -> bool:
    """Whether a method may run although no code names it."""
    return name in {"forward", "train", "eval"} or (
        name.startswith("__") and name.endswith("__") and name not in _NEVER
    )


_BY_NAME = frozenset({"getattr", "setattr", "delattr"})
_ALL = frozenset(
    "vars __dict__ __slots__ dir eval exec locals globals attrgetter methodcaller getmembers copy deepcopy asdict "
    "astuple dumps __getattribute__".split()
)
_NO_VALUE = frozenset({"CACHE", "NOP", "RESUME", "KW_NAMES", "EXTENDED_ARG"})
_CALL = "PRECALL" if "PRECALL" in dis.opmap else "CALL"
_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


def _computes_names(code: CodeType) -> bool:
    """Whether code may read or set attributes by names that are not written in it."""
    if _ALL.intersection(code.co_names):
        return True
    if not _BY_NAME.intersection(code.co_names):
        return False
    steps = list(dis.get_instructions(code))
    by_name = [k for k, step in enumerate(steps) if step.argval in _BY_NAME and step.opname.startswith("LOAD_")]
    return not all(_is_written(steps[k + 1 :]) for k in by_name)


def _is_written(steps: list[dis.Instruction]) -> bool:
    """Whether the second argument of the call is a text in the code. steps: those after the function is loaded."""
    stack: list[object] = []
    for step in steps:
        if step.opname in _NO_VALUE:
            continue
        if step.opname == _CALL and step.arg == len(stack):
            return len(stack) > 1 and isinstance(stack[1], str)
        effect = dis.stack_effect(step.opcode, step.arg)
        depth = len(stack) + effect
        if step.opcode in _JUMPS or depth < 1:
            return False
        if step.opname == "LOAD_CONST":
            stack.append(step.argval)
        else:
            stack = [*stack[: min(depth - 1, len(stack) + min(effect, 0))], *([None] * depth)][:depth]
            stack[-1] = None
    return False
