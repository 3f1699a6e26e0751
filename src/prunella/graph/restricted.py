"""Restrict calls that run along an axis of units to the kept units, as in the smaller model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunella.graph.cut.changes import Along
from prunella.graph.trace.call_names import CALCULATES, SIZE
from prunella.model.calls import called


class Restricted(TorchFunctionMode):
    """Restricts the calls in `along` to the kept positions, as in the smaller model."""

    def __init__(self, along: Sequence[Along]) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.at: dict[tuple[str, int], list[Along]] = {}
        for call in along:
            self.at.setdefault((call.name, call.number), []).append(call)
        self.narrowed = any(call.name == SIZE for call in along)
        self.repeated = _repeated(along)
        self.widths: dict[tuple[str, int], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = called(func)
        if func == Tensor.shape.__get__ or name == "size":  # type: ignore[attr-defined]
            return self._sizes(func(*args, **(kwargs or {})), *args[1:], **(kwargs or {}))
        if self.narrowed:
            args, kwargs = _plain(args, name in CALCULATES), _plain(kwargs or {}, name in CALCULATES)
        number, kwargs = self.count[name], kwargs or {}
        self.count[name] += 1
        for call in self.at.get((name, number)) or self._further(name, number, args):
            kept = call.kept.to(args[0].device)
            self.widths.setdefault((name, call.number), args[0].shape[_axis_of(call)])
            if name in _CHOICES:
                removed = torch.ones(args[0].shape[call.axis], dtype=torch.bool, device=kept.device)
                removed[kept] = False
                args = (_hidden(args[0], removed, call.axis), *args[1:])
            elif name in _STATISTICS:
                args = (args[0].index_select(call.axis, kept), *args[1:])
            elif name in _INSIDE:
                return _inside(func, args, kwargs, kept, call.axis)
            else:
                return _normed(func, args, kwargs, kept)
        return func(*args, **kwargs)

    def _further(self, name: str, number: int, args: Any) -> Sequence[Along]:
        """A call beyond those of the example, of a loop over a longer input, as the calls of the name repeat."""
        call = self.repeated[name].call(number) if name in self.repeated else None
        if call is None or not args or not isinstance(args[0], Tensor) or args[0].dim() <= max(0, _axis_of(call)):
            return ()
        return (call,) if args[0].shape[_axis_of(call)] == self.widths.get((name, call.number)) else ()

    def _sizes(self, answer: Any, dim: int | None = None) -> Any:
        """The sizes; in a calculation they are numbers of kept positions."""
        number = self.count[SIZE]
        self.count[SIZE] += 1
        calls = self.at.get((SIZE, number), ())
        if not calls:
            return answer
        sizes = [answer] if dim is not None else list(answer)
        lost = Counter[int]()
        for call in calls:
            axis = 0 if dim is not None else call.axis
            lost[axis] += sizes[axis] - len(call.kept)
        narrowed = [_Narrowed(size, size - lost[axis]) if lost[axis] else size for axis, size in enumerate(sizes)]
        return narrowed[0] if dim is not None else torch.Size(narrowed)


def _repeated(along: Sequence[Along]) -> dict[str, _Loop]:
    """The calls of a name in the example, and in a loop that goes on."""
    calls: dict[str, list[Along]] = {}
    for call in along:
        calls.setdefault(call.name, []).append(call)
    return {name: _Loop(same) for name, same in calls.items() if name != SIZE and _single(same)}


class _Loop:
    """The calls of one name. Its steps are looked for when a call beyond those of the example is made: most runs make
    none, and a language model has hundreds of calls of a name.
    """

    def __init__(self, calls: Sequence[Along]) -> None:
        self._calls = calls

    def call(self, number: int) -> Along | None:
        """The call of the example that a later number repeats; None for one that no cut reaches."""
        calls, first, length = self._steps
        return calls[first + (number - first) % length]

    @cached_property
    def _steps(self) -> tuple[list[Along | None], int, int]:
        return _steps(self._calls)


def _steps(calls: Sequence[Along]) -> tuple[list[Along | None], int, int]:
    """The calls of a name by number, the start of a loop that runs to the last one, and the calls of its step.

    The loop runs at least twice, and as many calls as possible belong to it. Without such a loop all calls are one
    step.
    """
    at = {call.number: call for call in calls}
    row = [at.get(number) for number in range(calls[0].calls or len(calls))]
    found = [(_start(row, length), length) for length in range(1, len(row) // 2 + 1)]
    start, length = min(((k, length) for k, length in found if k + 2 * length <= len(row)), default=(0, len(row)))
    return row, start, length


def _start(row: Sequence[Along | None], length: int) -> int:
    """From which number on the calls repeat with this length, to the last one."""
    differ = [k for k in range(len(row) - length) if not _same(row[k], row[k + length])]
    return max(differ, default=-1) + 1


def _axis_of(call: Along) -> int:
    """The axis of a call; -1 for norms over the last axis, which accept any number of axes before it."""
    return call.axis if call.name in {*_CHOICES, *_STATISTICS, *_INSIDE} else -1


def _single(calls: Sequence[Along]) -> bool:
    """Whether each call is along one axis, and within the calls of the example."""
    numbers = {call.number for call in calls}
    return len(numbers) == len(calls) and max(numbers) < (calls[0].calls or len(calls))


def _same(one: Along | None, other: Along | None) -> bool:
    if one is None or other is None:
        return one is other
    return _axis_of(one) == _axis_of(other) and torch.equal(one.kept, other.kept)


class _Narrowed(int):
    """A size of the dense model; in a calculation it counts as the number of kept positions."""

    kept: int

    def __new__(cls, size: int, kept: int) -> _Narrowed:
        narrowed = super().__new__(cls, size)
        narrowed.kept = kept
        return narrowed

    def __float__(self) -> float:
        return float(self.kept)


def _install(name: str) -> None:
    def method(self: _Narrowed, other: Any) -> Any:
        whole = isinstance(other, int) and "div" not in name and (name != "__pow__" or other >= 0)
        return getattr(int, name)(int(self), other) if whole else getattr(float, name)(float(self.kept), other)

    setattr(_Narrowed, name, method)


for _name in "add radd sub rsub mul rmul truediv rtruediv pow".split():
    _install(f"__{_name}__")


def _plain(tree: Any, number: bool) -> Any:
    """Arguments with plain integers: the number of kept positions in a calculation, otherwise the size."""
    if isinstance(tree, _Narrowed):
        return tree.kept if number else int.__add__(tree, 0)
    if isinstance(tree, dict):
        return {key: _plain(item, number) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(_plain(tree.start, number), _plain(tree.stop, number), tree.step)
    return type(tree)(_plain(item, number) for item in tree) if type(tree) in {tuple, list} else tree


_CHOICES = frozenset({"softmax", "topk"})
_STATISTICS = frozenset("mean var std var_mean std_mean norm linalg_vector_norm sum".split())
_INSIDE = {"normalize": (), "group_norm": ("weight", "bias")}
"""Calls that rescale their input -> their parameters along the axis."""
_GROUPED = ("input", "num_groups", "weight", "bias", "eps")


def _inside(func: Any, args: Any, kwargs: Any, kept: Tensor, axis: int) -> Tensor:
    """The result of such a call on the kept positions; zero elsewhere."""
    arguments = {**dict(zip(_GROUPED, args, strict=False)), **kwargs} if called(func) == "group_norm" else kwargs
    affine = {k: arguments[k].index_select(0, kept) for k in _INSIDE[called(func)] if arguments.get(k) is not None}
    value = args[0] if args else kwargs["input"]
    rest = args[1:] if called(func) == "normalize" else ()
    others = {key: entry for key, entry in arguments.items() if key not in {"input", "weight", "bias"}}
    narrow = func(value.index_select(axis, kept), *rest, **{**others, **affine})
    return torch.zeros_like(value).index_copy(axis, kept, narrow)


def _hidden(values: Tensor, removed: Tensor, axis: int) -> Tensor:
    """The values with removed positions that softmax and topk never choose."""
    shape = [-1 if k == axis else 1 for k in range(values.dim())]
    return values.masked_fill(removed.reshape(shape), -torch.inf)


def _normed(func: Any, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """A norm of the last axis over the kept positions; zero elsewhere."""
    names = ("input", "normalized_shape", "weight", "bias", "eps") if called(func) == "layer_norm" else _RMS
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    affine = {k: arguments[k].index_select(0, kept) for k in ("weight", "bias") if arguments.get(k) is not None}
    value = arguments["input"]
    narrow = func(
        value.index_select(-1, kept), (len(kept),), **affine, eps=arguments.get("eps", _EPS.get(called(func)))
    )
    return torch.zeros_like(value).index_copy(-1, kept, narrow)


_RMS = ("input", "normalized_shape", "weight", "eps")
_EPS = {"layer_norm": 1e-5}
