"""What the user's own code reads besides its arguments: globals, and the state of objects; see `io/contents.py`.

What the code itself changes (a counter, a cache, a list of results) is left out, since it differs from call to call.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

KNOWN = ("prunella", "torch")
"""Packages whose functions are known by name and version."""
_INSTALLED = {"site-packages", "dist-packages"}
_GLOBALS, _ATTRIBUTES = ("LOAD_GLOBAL", "LOAD_NAME"), ("LOAD_ATTR", "LOAD_METHOD")
_OWNERS = {"STORE_SUBSCR": 2, "DELETE_SUBSCR": 2, "STORE_SLICE": 3, "STORE_ATTR": 1, "DELETE_ATTR": 1}
"""Steps that change an item or attribute -> where its owner lies on the stack, from the top."""
_MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft",
             "remove", "reverse", "setdefault", "sort", "update"}  # fmt: skip
_BUILDERS = {"__init__", "__new__", "__post_init__", "__setstate__"}
"""Methods that run before anything is asked of an object."""
_CONSTANTS = (bool, int, float, complex, str, bytes, tuple, frozenset, PurePath, type(None))
_PLAIN = {"builtins", "collections", "enum", "functools", "pathlib", "types"}
"""Parts of Python's library whose objects hold data; others hold the state of the process, such as `os.environ`."""


def is_own(module: object) -> bool:
    """Whether a module is the user's: not prunella, torch, Python's own library or an installed package."""
    root = str(module).partition(".")[0]
    if root in KNOWN or root in sys.stdlib_module_names:
        return False
    loaded = sys.modules.get(str(module)) or sys.modules.get(root)
    file = getattr(loaded, "__file__", None)
    return file is None or not _INSTALLED & {*Path(file).parts}


class Reads:
    """What functions and objects read besides arguments. Modules and classes are looked through once."""

    def __init__(self) -> None:
        self._changed: dict[int, tuple[object, set[str]]] = {}

    def globals_of(self, function: FunctionType) -> dict[str, object]:
        """The globals that a function reads, and those of the user's modules that it reads as `module.name`."""
        space, found = function.__globals__, dict[str, object]()
        changed = self._changed_in(space, changed_globals)
        for name, attribute in _loads(_with_inner(function.__code__)):
            value = space.get(name)
            if isinstance(value, ModuleType):
                if is_own(value.__name__) and attribute not in self._changed_in(vars(value), changed_globals):
                    found[f"{name}.{attribute}"] = vars(value).get(attribute)
            elif name in space and not name.startswith("__") and name not in changed:
                found[name] = value
        return {name: value for name, value in sorted(found.items()) if _holds_data(value)}

    def state_of(self, value: object) -> dict[str, object]:
        """The attributes of an object of the user's own class that its methods do not change."""
        if isinstance(value, SimpleNamespace):
            return dict(vars(value))
        if not is_own(type(value).__module__):
            return {}
        changed = self._changed_in(type(value), changed_attributes)
        held = getattr(value, "__dict__", {})
        return {name: part for name, part in held.items() if name not in changed and _holds_data(part)}

    def _changed_in(self, owner: Any, find: Callable[[Any], set[str]]) -> set[str]:
        if id(owner) not in self._changed:
            self._changed[id(owner)] = owner, find(owner)
        return self._changed[id(owner)][1]


def members(kind: type) -> Iterator[tuple[str, object]]:
    """The methods and constants of a class and of those of its bases that are the user's own."""
    for base in kind.__mro__:
        if is_own(base.__module__):
            for name, value in sorted(vars(base).items()):
                for part in _functions(value):
                    yield f"{base.__qualname__}.{name}", part
                if isinstance(value, _CONSTANTS) and not name.startswith("__"):
                    yield f"{base.__qualname__}.{name}", value


def changed_attributes(kind: type) -> set[str]:
    """The attributes that the methods of a class change, but for those that build it."""
    functions = (
        function for base in kind.__mro__ if is_own(base.__module__)
        for name, member in vars(base).items() if name not in _BUILDERS for function in _functions(member)
    )  # fmt: skip
    return _changed((code for one in functions for code in _with_inner(one.__code__)), _ATTRIBUTES, "STORE_ATTR")


def _holds_data(value: object) -> bool:
    module = str(type(value).__module__).partition(".")[0]
    return module not in sys.stdlib_module_names or module in _PLAIN


def _functions(member: object) -> Iterator[FunctionType]:
    """The functions of a member of a class: a method of any kind, or the parts of a property."""
    if isinstance(member, staticmethod | classmethod | MethodType):
        member = member.__func__
    parts = (member.fget, member.fset) if isinstance(member, property) else (member,)
    for part in parts:
        function = part.func if isinstance(part, partial) else part
        if isinstance(function, FunctionType):
            yield function


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _loads(codes: Iterable[CodeType]) -> Iterator[tuple[str, str]]:
    """Every global that is read, and the attribute of it that is read at once; "" if there is none."""
    for code in codes:
        for one, after in pairwise(dis.get_instructions(code)):
            if one.opname in _GLOBALS:
                yield str(one.argval), str(after.argval) if after.opname in _ATTRIBUTES else ""


def changed_globals(space: Mapping[str, Any]) -> set[str]:
    """What the functions and methods of a module change of it."""
    present = dict(space)  # in one step: an attribute that is asked for may import
    own = [value for value in present.values() if getattr(value, "__module__", None) == space.get("__name__")]
    members = (member for value in own if isinstance(value, type) for member in dict(vars(value)).values())
    functions = [function for member in (*own, *members) for function in _functions(member)]
    return _changed((code for one in functions for code in _with_inner(one.__code__)), _GLOBALS, "STORE_GLOBAL")


def _changed(codes: Iterable[CodeType], loads: tuple[str, ...], stores: str) -> set[str]:
    """The names, as `loads` read and `stores` writes them, that code changes: themselves, or a part of them."""
    names = set[str]()
    for code in codes:
        steps = list(dis.get_instructions(code))
        names.update(str(step.argval) for step in steps if step.opname == stores)
        names.update(str(one.argval) for one, after in pairwise(steps) if one.opname in loads and _mutates(after))
        for place, step in enumerate(steps):
            if step.opname in _OWNERS:
                owner = _pushed(steps, place, _OWNERS[step.opname])
                names.update(str(one.argval) for one in steps[owner : owner + 2] if one.opname in loads)
    return names


def _mutates(step: dis.Instruction) -> bool:
    """Whether a step reads a method that changes its owner, such as `append`, or `add_` of a tensor."""
    name = str(step.argval)
    in_place = name.endswith("_") and not name.endswith("__")
    return step.opname in _ATTRIBUTES and (name in _MUTATORS or in_place)


def _pushed(steps: Sequence[dis.Instruction], place: int, depth: int) -> int:
    """The step that pushed what lies so deep on the stack before the step at `place`; `x[k] += v` swaps it upwards."""
    depth += steps[place - 1].opname == "SWAP"
    height = 0
    for number in range(place - 1, -1, -1):
        step = steps[number]
        height -= dis.stack_effect(step.opcode, step.arg, jump=False)
        if height <= -depth:
            return number
    return 0
