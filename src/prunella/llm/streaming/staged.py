"""Hidden states of a run whose blocks are on an accelerator: they wait in the memory of the CPU, or on disk.

Where the accelerator has streams, a copy runs beside the work on the block: the next batch is sent while this one is
computed, and the last output is fetched while the next is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from prunella.llm.blocks import BlockCall, StoreActivations, StoredTensors
from prunella.model.trees import each

Arrival = Callable[[], Tensor]
"""Waits for a copy, and returns it."""
_STREAMS = frozenset({"cuda", "xpu"})
"""Types of devices whose copies can run beside their work."""
_SHARED = 16
"""Most tensors, such as masks, of the calls of a block that are on the device at once."""


class Lane:
    """Copies between the memory of the CPU and a device, each done when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensor: Tensor) -> Arrival:
        """To the device."""
        return partial(tensor.to, self.device)

    def fetch(self, tensor: Tensor) -> Arrival:
        """To the memory of the CPU."""
        return tensor.detach().cpu


class StreamLane(Lane):
    """Copies on a stream of their own, out of and into memory that the device reads by itself (pinned)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = self._module.Stream(device)

    def send(self, tensor: Tensor) -> Arrival:
        with self._module.stream(self._stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        done = self._stream.record_event()

        def arrived() -> Tensor:
            work = self._module.current_stream(self.device)
            work.wait_event(done)
            copy.record_stream(work)  # its memory is not used again before the work on it is done
            return copy

        return arrived

    def fetch(self, tensor: Tensor) -> Arrival:
        source = tensor.detach()
        copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
        self._stream.wait_stream(self._module.current_stream(self.device))  # until it is computed
        with self._module.stream(self._stream):
            copy.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        done = self._stream.record_event()

        def arrived() -> Tensor:
            done.synchronize()
            return copy

        return arrived


def lane_to(device: torch.device) -> Lane:
    """The copies that this device can make."""
    return StreamLane(device) if device.type in _STREAMS else Lane(device)


class Staged(StoredTensors):
    """Tensors in a store of the CPU. Each is on the device when it is indexed; the one after it is then on its way."""

    def __init__(self, tensors: Iterable[Tensor], store: StoreActivations, lane: Lane) -> None:
        self._lane = lane
        self._host = store(_fetched(tensors, lane))
        self._ahead: dict[int, Arrival] = {}
        super().__init__(len(self._host))

    def read(self, k: int) -> Tensor:
        arrival = self._ahead.pop(k, None) or self._lane.send(self._host[k])
        self._ahead = {k + 1: self._lane.send(self._host[k + 1])} if k + 1 < len(self) else {}
        return arrival()


def _fetched(tensors: Iterable[Tensor], lane: Lane) -> Iterator[Tensor]:
    """The tensors in the memory of the CPU, each while the one after it is computed."""
    last: Arrival | None = None
    for tensor in tensors:
        arrival = lane.fetch(tensor)
        if last is not None:
            yield last()
        last = arrival
    if last is not None:
        yield last()


def staged(store: StoreActivations, device: torch.device) -> StoreActivations:
    """The store for blocks on this device; itself for the CPU."""
    return store if device.type == "cpu" else partial(Staged, store=store, lane=lane_to(device))


class CallsOn(Sequence[BlockCall]):
    """Calls with all of their tensors on a device; those that calls share are moved once."""

    def __init__(self, calls: Sequence[BlockCall], device: torch.device) -> None:
        self._calls, self._device = calls, device
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, which the first of the two keeps

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, k: int) -> BlockCall: ...
    @overload
    def __getitem__(self, k: slice) -> CallsOn: ...
    def __getitem__(self, k: int | slice) -> BlockCall | CallsOn:
        if isinstance(k, slice):
            return CallsOn(self._calls[k], self._device)
        call = self._calls[k]
        return BlockCall(each(call.args, self._move), each(call.kwargs, self._move))

    def _move(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():  # in place of hidden states
            return tensor
        if id(tensor) not in self._moved:
            if len(self._moved) >= _SHARED:
                self._moved.pop(next(iter(self._moved)))
            self._moved[id(tensor)] = tensor, tensor.to(self._device)
        return self._moved[id(tensor)][1]
