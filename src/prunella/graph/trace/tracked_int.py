"""Integers with a known origin, so that the sizes in a model's source can follow a cut.

During a capture every integer attribute of the model's modules and configurations is replaced by a `Tracked`, an `int`
with an expression. `Tensor.shape` returns `Tracked` sizes too. In the arguments of `view`, `split`, `expand` and so on
they distinguish a size that follows the cut (an attribute, a shape) from a literal in the source.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.nested_sizes import changed, is_nested, sizes_in
from prunella.graph.solve.labels import Dim
from prunella.model.unread import is_elsewhere, unread


@dataclass(frozen=True)
class Attr:
    """Leaf: the integer attribute `name` of the module or configuration `owner`, or entry `index` of a list of them."""

    owner: str
    name: str
    value: int
    index: int = -1


@dataclass(frozen=True, eq=False)
class Shape:
    """Leaf: the size of a tensor's dimension, with its labels. axis: that of the model's input, or -1.

    read: number of the read of this size in the run, and the axis; a negative number if it is not numbered.
    """

    dim: Dim
    value: int
    axis: int = -1
    read: tuple[int, int] = (-1, -1)


@dataclass(frozen=True, eq=False)
class Apply:
    """A node: `operation(left, right)`."""

    operation: Callable[[Any, Any], int]
    left: Expression
    right: Expression


Expression = Attr | Shape | Apply | int | float


@dataclass(frozen=True, eq=False)
class SizeComparison:
    """`operation(left, right)` decided a branch in the source: the outcome must not change."""

    operation: Callable[[Any, Any], bool]
    left: Expression
    right: Expression


@dataclass(frozen=True, eq=False)
class Calculation:
    """The size is a number in a calculation of floating-point numbers."""

    size: Expression


Leak = Callable[[Expression | SizeComparison | Calculation], None]


def leaves(expression: Expression | SizeComparison) -> Iterator[Attr | Shape]:
    """The attribute and shape leaves of an expression."""
    if isinstance(expression, Apply | SizeComparison):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif isinstance(expression, Attr | Shape):
        yield expression


def evaluate(expression: Expression, value: Callable[[Attr | Shape], int]) -> Any:
    """The value of an expression for given values of its leaves."""
    if isinstance(expression, Apply):
        return expression.operation(evaluate(expression.left, value), evaluate(expression.right, value))
    return value(expression) if isinstance(expression, Attr | Shape) else expression


class Tracked(int):
    """An integer with its expression.

    Arithmetic with a result outside the integers is reported to `leak` as a use of the size as a number. A comparison
    is reported as `left operation right`, whose outcome must not change.
    """

    expression: Expression
    leak: Leak

    def __new__(cls, value: int, expression: Expression, leak: Leak) -> Tracked:
        tracked = super().__new__(cls, value)
        tracked.expression, tracked.leak = expression, leak
        return tracked

    def __deepcopy__(self, memo: object) -> int:
        return plain(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (plain(self),)

    def __hash__(self) -> int:
        if _of_inputs(self.expression):
            self.leak(self.expression)
        return int.__hash__(self)

    def __neg__(self) -> Tracked:
        return Tracked(-plain(self), Apply(int.__sub__, 0, self.expression), self.leak)

    def __abs__(self) -> Tracked:
        return Tracked(abs(plain(self)), Apply(_distance, self.expression, 0), self.leak)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        if isinstance(other, float) or (type(other) is int and other < 0 and modulus is None):
            self.leak(_number(self.expression))
            return pow(plain(self), other)
        if type(other) is not int or modulus is not None or not _of_inputs(self.expression):
            self.leak(self.expression)
            return pow(plain(self), other, modulus)
        return Tracked(plain(self) ** other, Apply(int.__pow__, self.expression, other), self.leak)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __rdivmod__(self, other: int) -> tuple[int, int]:
        return other // self, other % self


def _number(expression: Expression) -> Expression | Calculation:
    """A size in a calculation: the size itself if it comes from one read of the run, otherwise a `Calculation`."""
    alone = isinstance(expression, Shape) and expression.dim and expression.read[0] >= 0
    return Calculation(expression) if alone else expression


def plain(value: int) -> int:
    """The bare integer."""
    return int.__add__(value, 0)


def bare(tree: Any) -> Any:
    """Arguments with plain integers instead of tracked ones."""
    if isinstance(tree, Tracked):
        return plain(tree)
    if type(tree) in {tuple, list}:
        return type(tree)(bare(item) for item in tree)
    if isinstance(tree, torch.Size):
        return torch.Size([bare(item) for item in tree])
    if isinstance(tree, slice):
        return slice(bare(tree.start), bare(tree.stop), bare(tree.step))
    return {key: bare(item) for key, item in tree.items()} if type(tree) is dict else tree


def expression_of(value: int) -> Expression:
    """The expression of a tracked integer, or a plain integer itself."""
    return value.expression if isinstance(value, Tracked) else value


def _install(name: str, operation: Callable[[int, int], int], reverse: bool) -> None:
    def method(self: Tracked, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            if isinstance(other, float):
                self.leak(_number(self.expression))
            return NotImplemented if isinstance(other, Tensor) else getattr(int, name)(plain(self), other)
        left, right = (other, self) if reverse else (self, other)
        value = operation(plain(left), plain(right))
        return Tracked(value, Apply(operation, expression_of(left), expression_of(right)), self.leak)

    setattr(Tracked, name, method)


def _install_text(name: str) -> None:
    def method(self: Tracked, *form: Any) -> str:
        if _of_inputs(self.expression):
            self.leak(self.expression)
        return str(getattr(int, name)(plain(self), *form))

    setattr(Tracked, name, method)


def _of_inputs(expression: Expression) -> bool:
    """Whether the expression has only sizes of inputs, which no cut changes."""
    return all(isinstance(leaf, Shape) and not leaf.dim for leaf in leaves(expression))


def _distance(left: int, right: int) -> int:
    return abs(left - right)


def _install_comparison(name: str) -> None:
    of_integers, of_numbers = getattr(int, name), getattr(operator, name)

    def method(self: Tracked, other: Any) -> Any:
        if isinstance(other, float):
            self.leak(SizeComparison(of_numbers, self.expression, other))
            return of_numbers(plain(self), other)
        if isinstance(other, int) and not isinstance(other, bool):
            self.leak(SizeComparison(of_integers, self.expression, expression_of(other)))
        return of_integers(plain(self), other)

    setattr(Tracked, name, method)


def _install_leak(name: str, *, calculates: bool = False) -> None:
    def method(self: Tracked, *others: Any) -> Any:
        self.leak(_number(self.expression) if calculates else self.expression)
        return getattr(int, name)(plain(self), *others)

    setattr(Tracked, name, method)


for _symbol, _operation in {
    "add": int.__add__,
    "sub": int.__sub__,
    "mul": int.__mul__,
    "floordiv": int.__floordiv__,
    "mod": int.__mod__,
}.items():
    _install(f"__{_symbol}__", _operation, False)
    _install(f"__r{_symbol}__", _operation, True)
for _symbol in ("eq", "ne", "lt", "le", "gt", "ge"):
    _install_comparison(f"__{_symbol}__")
for _symbol in ("float", "truediv", "rtruediv"):
    _install_leak(f"__{_symbol}__", calculates=True)
for _symbol in ("int trunc floor ceil round rpow and rand or ror xor rxor lshift rlshift rshift rrshift").split():
    _install_leak(f"__{_symbol}__")
_install_leak("bit_length")
for _symbol in ("__str__", "__repr__", "__format__"):
    _install_text(_symbol)


class Slots(MutableMapping[str, Any]):
    """The `__slots__` of an object that has no `__dict__`, as a dictionary."""

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def _names(self) -> list[str]:
        declared = [vars(kind).items() for kind in type(self._owner).__mro__]
        slots = [name for entries in declared for name, entry in entries if isinstance(entry, MemberDescriptorType)]
        return [name for name in slots if hasattr(self._owner, name)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self._owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def space_of(owner: object) -> MutableMapping[str, Any]:
    """The attributes of an object, to read and to set."""
    return vars(owner) if hasattr(owner, "__dict__") else Slots(owner)


def _has_slots(value: object) -> bool:
    return not hasattr(value, "__dict__") and any("__slots__" in vars(kind) for kind in type(value).__mro__)


def holders(model: nn.Module) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Every space of attributes with sizes: those of modules and of their plain configuration objects."""
    seen = set(unread(model))
    for path, module in model.named_modules():
        yield path, vars(module)
        for name, value in vars(module).copy().items():
            if is_elsewhere(value):
                continue
            plain_object = hasattr(value, "__dict__") or _has_slots(value)
            excluded = isinstance(value, nn.Module | Tensor | type) or callable(value) or not plain_object
            if excluded or id(value) in seen or type(value).__module__.split(".")[0] in {"torch", "builtins"}:
                continue
            seen.add(id(value))
            yield f"{path}:{name}", space_of(value)


def holder(model: nn.Module, owner: str) -> Any:
    """The object that an `Attr.owner` names."""
    path, _, name = owner.partition(":")
    module = model.get_submodule(path)
    return getattr(module, name) if name else module


def size_of(value: object) -> int | None:
    """The size that an attribute holds: an integer, or a tuple of one."""
    if type(value) is tuple and len(value) == 1:
        value = value[0]
    return value if type(value) is int else None


@contextmanager
def tracked_attributes(model: nn.Module, leak: Leak) -> Iterator[None]:
    """Inside, the integers of the model's modules and configurations are `Tracked`; afterwards they are restored.

    A tuple of one integer, such as the size of a norm, counts as this integer; longer lists, and containers in
    containers, have an entry for each size.
    """
    wrapped: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
    of_torch = {id(vars(module)) for module in model.modules() if type(module).__module__.startswith("torch.")}
    try:
        for owner, values in holders(model):
            for name, value in list(values.items()):
                tracked = _tracked(owner, name, value, leak, lists=id(values) not in of_torch)
                if tracked is not None:
                    values[name] = tracked
                    wrapped.append((values, name, value, tracked))
        yield
    finally:
        for values, name, old, tracked in wrapped:
            now = values.get(name)
            values[name] = old if now is tracked and bare(now) == old else bare(now)


def _tracked(owner: str, name: str, value: Any, leak: Leak, *, lists: bool) -> Any:
    """An attribute with `Tracked` integers; None if it holds no size. lists: also longer lists, unlike torch's own."""
    if type(value) is int:
        return Tracked(value, Attr(owner, name, value), leak)
    if type(value) is tuple and len(value) == 1 and type(value[0]) is int:
        return (Tracked(value[0], Attr(owner, name, value[0]), leak),)
    sizes = sizes_in(value) if lists and type(value) in (list, tuple, dict) and len(value) <= _LONGEST else ()
    least = 1 if is_nested(value) else 2  # a list of one entry is seldom one of sizes
    if least <= len(sizes) <= _LONGEST and min(sizes) > 1:
        return changed(value, lambda k, n: Tracked(n, Attr(owner, name, n, k), leak))
    return None


_LONGEST = 32
"""Longer lists are data, not sizes."""
