"""Run a model again from the first call that a change of some weights can reach; earlier calls give what they gave.

What the calls from one on can read of those before it is the state at this call: the storages that were made before it
and are read later, a few activations. A pass that starts at a state runs the source of the model from its first line,
but the calls before the state compute nothing. What they gave that is in no state is a placeholder of NaN, which no
call may read: where one would, the whole model runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from prunella.model.trees import tensors

MOST = 1_500_000_000
"""Most bytes of states that all recordings of one search keep."""
Storage = torch.UntypedStorage
State = dict[int, Storage]
"""Number of a storage -> its content at a call."""


class Recording:
    """The calls of one pass, in order, its output, and the states that are kept (place of a call -> state).

    most: bytes of all states. whole: why no pass can start at a state, or empty.
    """

    def __init__(self, run: Callable[[], Any], most: int) -> None:
        self.run, self.most, self.whole = run, most, ""
        self.states: dict[int, State] = {}
        recorder = _Recorder()
        with recorder:
            self.output = run()
        self.calls, self.storages, self.whole = recorder.calls, recorder.storages, recorder.whole
        self._read, self._written = dict[int, int](), dict[int, int]()
        for place, call in enumerate(self.calls):
            self._read.update(dict.fromkeys(call.read, place))
            self._written.update(dict.fromkeys(call.written, place))
        self._read.update({self.storages.number(tensor): len(self.calls) for tensor in tensors(self.output)})

    @classmethod
    def of(cls, run: Callable[[], Any], most: int = MOST) -> Recording:
        """Record a pass. run: it, without arguments, in evaluation mode and without gradients."""
        return cls(run, most)

    @property
    def size(self) -> int:
        """Bytes of all states; what two of them share counts once."""
        return sum({one._cdata: one.nbytes() for state in self.states.values() for one in state.values()}.values())

    def first(self, changed: Iterable[Tensor]) -> int:
        """The place of the first call that reads one of these tensors; 0 if no recorded call does."""
        numbers = {self.storages.number(tensor) for tensor in changed}
        return next((k for k, call in enumerate(self.calls) if not numbers.isdisjoint(call.read)), 0)

    def keep(self, places: Iterable[int]) -> None:
        """Keep the states at these calls, the first ones as far as memory reaches; others are dropped.

        Nothing happens if the first of them is kept or has no room alone. The model is to be as it was recorded.
        """
        wanted = sorted(set(places))
        if self.whole or wanted[0] in self.states or self._bytes(wanted[0]) > self.most:
            return
        start = max((place for place in self.states if place < wanted[0]), default=0)
        self.states = {place: state for place, state in self.states.items() if place == start or place in wanted}
        self._pass(start, _Taker(self, [place for place in wanted if place not in self.states], {*wanted}))
        self.states = {place: state for place, state in self.states.items() if place in wanted}
        if self.states and not _same(self._pass(max(self.states)), self.output):
            self._give_up("something other than a call of torch reads tensors")

    def again(self, changed: Iterable[Tensor]) -> Any:
        """The output with these tensors changed in place, from the last state that the change does not reach.

        The same calls run in the same order as before, until then.
        """
        first = self.first(changed)
        return self._pass(max((place for place in self.states if place <= first), default=0))

    def live(self, place: int) -> list[int]:
        """The storages of the state at a call: made before it, read at it or later."""
        made = self.storages.made
        return [number for number, at in made.items() if at < place and self.read_from(number, place)]

    def read_from(self, number: int, place: int) -> bool:
        """Whether this call or a later one reads a storage, or it is in the output."""
        return self._read.get(number, -1) >= place

    def changes(self, number: int, place: int) -> bool:
        """Whether this call or a later one writes into a storage."""
        return self._written.get(number, -1) >= place

    def _bytes(self, place: int) -> int:
        return sum(self.storages.sizes[number] for number in self.live(place))

    def _pass(self, start: int, taker: _Taker | None = None) -> Any:
        replayer = _Replayer(self, start, taker)
        try:
            with replayer:
                output = self.run()
            if not replayer.missed:
                return output
        except _Missed:
            pass
        except Exception:  # of the model, which may have looked at a placeholder
            if not start:
                raise
        self._give_up("a call reads what is not kept, or the source runs another way")
        return self.run()

    def _give_up(self, why: str) -> None:
        self.states.clear()
        self.whole = why


# -- what is recorded ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedCall:
    """func: what was called. read, written: numbers of the storages that it took, and that it changed in place.

    result: what it gave, with a `_Place` for each tensor; None for what only the call itself can give.
    """

    func: Any
    read: frozenset[int]
    written: frozenset[int]
    result: _Constant | _Place | _Several | None


@dataclass(frozen=True)
class _Constant:
    """A number, a size, a text."""

    value: Any


@dataclass(frozen=True)
class _Several:
    """A tuple, a list, or one of `torch.return_types`."""

    kind: type
    parts: tuple[_Constant | _Place | _Several, ...]


@dataclass(frozen=True)
class _Place:
    """How a tensor lies in a storage. number: of the storage."""

    number: int
    dtype: torch.dtype
    device: torch.device
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def on(self, storage: Storage) -> Tensor:
        """The tensor, on a storage with its content."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, self.offset, self.size, self.stride)

    def nothing(self) -> Tensor:
        """A tensor of this shape that takes no memory."""
        value = float("nan") if self.dtype.is_floating_point or self.dtype.is_complex else 0
        return torch.full((), value, dtype=self.dtype, device=self.device).expand(self.size)


def _key(storage: Storage) -> StorageWeakRef:
    """What tells a storage from all others, also from one at the same address after its end."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _copy(storage: Storage) -> Storage:
    copy: Storage = storage.clone()  # type: ignore[no-untyped-call]
    return copy


@dataclass
class _Storages:
    """Numbers of storages, which no later storage takes again. made: number -> the call that gave it. sizes: bytes."""

    numbers: dict[StorageWeakRef, int] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def number(self, tensor: Tensor) -> int:
        """Of the storage of a tensor; a new one for one that was not seen."""
        if tensor.layout is not torch.strided:
            return -1 - id(tensor)
        storage = tensor.untyped_storage()
        number = self.numbers.setdefault(_key(storage), len(self.numbers))
        self.sizes[number] = storage.nbytes()
        return number

    def known(self, tensor: Tensor) -> bool:
        """Whether the storage has a number."""
        return tensor.layout is torch.strided and _key(tensor.untyped_storage()) in self.numbers


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.storages, self.whole = _Storages(), ""
        self._versions: dict[int, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors([args, kwargs])
        numbers, versions = [self.storages.number(tensor) for tensor in given], [_version(t) for t in given]
        self._check(numbers, versions)
        result = func(*args, **kwargs)
        written = {n for n, t, v in zip(numbers, given, versions, strict=True) if _version(t) != v}
        if [self.storages.number(tensor) for tensor in given] != numbers:
            self.whole = "a call gives a tensor another storage"
        for tensor in tensors(result):
            if not self.storages.known(tensor):
                self.storages.made[self.storages.number(tensor)] = len(self.calls)
            if tensor.is_inference():
                self.whole = "changes in place of inference tensors are not seen"
        self._versions.update({self.storages.number(t): _version(t) for t in (*given, *tensors(result))})
        told = _told(result, self.storages)
        self.calls.append(RecordedCall(func, frozenset(numbers), frozenset(written), told))
        return result

    def _check(self, numbers: Sequence[int], versions: Sequence[int]) -> None:
        """Whether the storages are as the last call left them."""
        if any(self._versions.get(n, v) != v for n, v in zip(numbers, versions, strict=True)):
            self.whole = "something other than a call of torch changes tensors in place"


_CONSTANTS: tuple[type, ...] = (bool, int, float, complex, str, type(None), torch.Size)
_CONSTANTS += (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _told(result: Any, storages: _Storages) -> Any:
    """The entry of a result in a recorded call."""
    if isinstance(result, _CONSTANTS):
        return _Constant(result)
    if type(result) is Tensor and result.layout is torch.strided:
        number, offset = storages.number(result), int(result.storage_offset())
        return _Place(number, result.dtype, result.device, offset, result.shape, result.stride())
    if type(result) in (tuple, list) or (isinstance(result, tuple) and hasattr(result, "n_sequence_fields")):
        parts = tuple(_told(part, storages) for part in result)
        return None if None in parts else _Several(type(result), parts)
    return None


# -- what is run again ---------------------------------------------------------------------------------------------


class _Missed(BaseException):
    """The pass reads what is not kept, or goes another way than the one that was recorded."""


class _Taker:
    """Takes the states at some calls while a pass runs. left: their places. counted: places whose states take room."""

    def __init__(self, recording: Recording, left: Sequence[int], counted: set[int]) -> None:
        self._recording, self._left, self._counted = recording, list(left), counted
        self._content: State = {}

    def begin(self, content: State) -> None:
        """The storages of the state at which the pass starts."""
        self._content.update(content)

    def before(self, place: int) -> None:
        """Take the state at this call, if it is wanted and there is room; without room no later one either."""
        if not self._left or self._left[0] != place:
            return
        self._left.pop(0)
        recording, live = self._recording, self._recording.live(place)
        if not all(number in self._content for number in live):
            return
        state = {n: _copy(self._content[n]) if recording.changes(n, place) else self._content[n] for n in live}
        states = {k: kept for k, kept in recording.states.items() if k in self._counted}
        room = {one._cdata: one.nbytes() for kept in (*states.values(), state) for one in kept.values()}
        if sum(room.values()) > recording.most:
            self._left.clear()
        else:
            recording.states[place] = state
        self._content = {n: one for n, one in self._content.items() if self._needs(n)}

    def behind(self, place: int, func: Any, result: Any) -> None:
        """Take the storages that a call has given."""
        call = self._recording.calls[place] if place < len(self._recording.calls) else None
        if call is None or call.func != func:
            self._left.clear()
        if not self._left or call is None:
            return
        for tensor, at in zip(tensors(result), _places(call.result), strict=False):
            if at.number in self._recording.storages.made and self._needs(at.number):
                self._content.setdefault(at.number, tensor.untyped_storage())

    def _needs(self, number: int) -> bool:
        return bool(self._left) and self._recording.read_from(number, self._left[0])


def _places(told: Any) -> list[_Place]:
    if isinstance(told, _Several):
        return [place for part in told.parts for place in _places(part)]
    return [told] if isinstance(told, _Place) else []


class _Replayer(TorchFunctionMode):
    """missed: whether the output is not to be used."""

    def __init__(self, recording: Recording, start: int, taker: _Taker | None) -> None:
        super().__init__()
        self.missed = False
        self._recording, self._start, self._taker = recording, start, taker
        state = recording.states.get(start, {})
        self._state = {n: _copy(one) if recording.changes(n, start) else one for n, one in state.items()}
        self._given: list[Storage] = [*self._state.values()]
        self._lent = {_key(one) for one in self._given}
        self._next = 0
        if taker is not None:
            taker.begin(self._state)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, place = kwargs or {}, self._next
        self._next += 1
        if place < self._start:
            return self._replayed(place, func, args, kwargs)
        if self._taker is None:
            return func(*args, **kwargs)
        self._taker.before(place)
        result = func(*args, **kwargs)
        self._taker.behind(place, func, result)
        return result

    def _replayed(self, place: int, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        call, made = self._recording.calls[place], self._recording.storages.made
        if call.func != func:
            self._miss()
        if call.result is not None and all(number in made for number in call.written):
            outside = {at.number for at in _places(call.result)} - made.keys()
            storages = self._outside(outside, args, kwargs) if outside else {}
            if outside == storages.keys():
                return self._built(call.result, storages)
        if any(_key(t.untyped_storage()) in self._lent for t in tensors([args, kwargs]) if _strided(t)):
            self._miss()
        return func(*args, **kwargs)

    def _outside(self, numbers: set[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> State:
        """The storages of weights and buffers among the arguments."""
        known = self._recording.storages
        given = [t for t in tensors([args, kwargs]) if known.known(t)]
        return {n: t.untyped_storage() for t in given if (n := known.number(t)) in numbers}

    def _built(self, told: _Constant | _Place | _Several, outside: State) -> Any:
        if isinstance(told, _Constant):
            return told.value
        if isinstance(told, _Several):
            parts = [self._built(part, outside) for part in told.parts]
            return parts if told.kind is list else tuple(parts) if told.kind is tuple else told.kind(parts)
        storage = outside.get(told.number, self._state.get(told.number))
        if storage is not None:
            return told.on(storage)
        nothing = told.nothing()
        self._given.append(nothing.untyped_storage())
        self._lent.add(_key(nothing.untyped_storage()))
        return nothing

    def _miss(self) -> None:
        self.missed = True
        raise _Missed


def _same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    pairs = list(zip(tensors(first), tensors(second), strict=False))
    return all(a.shape == b.shape and torch.allclose(a, b.to(a), equal_nan=True) for a, b in pairs)


def _strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
