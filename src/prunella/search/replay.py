"""Rerun a model from the first call that a change of some weights affects; earlier calls return recorded results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunella.model.trees import tensors

MOST = 1_500_000_000
"""Most bytes of recorded results in one search."""


@dataclass(frozen=True)
class RecordedCall:
    """One call of a pass. func: the called function. read: storages of its arguments.

    result: the recorded result; None if it has to be recomputed: a later call changes it in place, or memory is short.
    """

    func: Any
    read: frozenset[int]
    result: Any


@dataclass
class Recording:
    """The calls of one pass, in order. size: bytes of the recorded results."""

    run: Callable[[], Any]
    calls: list[RecordedCall] = field(default_factory=list)
    output: Any = None
    size: int = 0

    @classmethod
    def of(cls, run: Callable[[], Any], most: int = MOST) -> Recording:
        """Record a pass. run: the pass, without arguments, in evaluation mode and without gradients."""
        recorder = _Recorder(most)
        with recorder:
            output = run()
        calls = [
            call if _storages([call.result]).isdisjoint(recorder.changed) else RecordedCall(call.func, call.read, None)
            for call in recorder.calls
        ]
        return cls(run, calls, output, recorder.size)

    def again(self, changed: Iterable[Tensor]) -> Any:
        """The output with these tensors changed in place: calls before the first that reads one are not run.

        Up to that call, the calls must come in the recorded order.
        """
        storages = {tensor.untyped_storage().data_ptr() for tensor in changed}
        first = next((k for k, call in enumerate(self.calls) if not storages.isdisjoint(call.read)), 0)
        with _Replayer(self.calls[:first]):
            return self.run()


class _Recorder(TorchFunctionMode):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.changed: set[int] = set()
        self.size, self._most, self._kept = 0, most, set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors([args, kwargs])
        versions = [_version(tensor) for tensor in given]
        result = func(*args, **kwargs)
        for tensor, version in zip(given, versions, strict=True):
            if _version(tensor) != version:
                self.changed.add(_storage(tensor))
        self.calls.append(RecordedCall(func, frozenset(map(_storage, given)), self._keep(result)))
        return result

    def _keep(self, result: Any) -> Any:
        """The result if it consists of tensors and fits into the memory limit."""
        if not _plain(result):
            return None
        new = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors(result)}
        size = sum(size for storage, size in new.items() if storage not in self._kept)
        if self.size + size > self._most:
            return None
        self._kept.update(new)
        self.size += size
        return result


class _Replayer(TorchFunctionMode):
    def __init__(self, calls: Sequence[RecordedCall]) -> None:
        super().__init__()
        self._left: Iterator[RecordedCall] | None = iter(calls)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = None if self._left is None else next(self._left, None)
        if call is None or call.func != func:
            self._left = None  # the recording ends, or the code takes another path than before
            return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if call.result is None else call.result


def _plain(result: Any) -> bool:
    """Whether a result is a tensor, or a tuple or list of tensors."""
    if isinstance(result, tuple | list):
        return type(result) in (tuple, list) and bool(result) and all(isinstance(part, Tensor) for part in result)
    return isinstance(result, Tensor)


def _storages(values: Any) -> set[int]:
    return set(map(_storage, tensors(values)))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
