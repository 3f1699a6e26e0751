"""The state of autocast, which belongs to a device and to a thread: taken, and entered again elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """Autocast for one type of device. dtype: None for a device that has no autocast, such as meta."""

    device: str
    enabled: bool
    dtype: torch.dtype | None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Compute as this state says; weights that were cast are not kept."""
        if self.dtype is None:
            yield
            return
        with torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False):
            yield


def autocast_on(device: str) -> Autocast:
    """The state of this thread for a type of device: a model may set it for a part of its source."""
    if not torch.amp.is_autocast_available(device):
        return Autocast(device, enabled=False, dtype=None)
    return Autocast(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))


def autocast_off(device: str) -> Autocast:
    """No autocast on a type of device: what is computed there keeps its precision."""
    here = autocast_on(device)
    return Autocast(device, enabled=False, dtype=here.dtype)


@contextmanager
def all_entered(states: tuple[Autocast, ...]) -> Iterator[None]:
    """Compute as all of these states say."""
    with ExitStack() as entered:
        for state in states:
            entered.enter_context(state.entered())
        yield


def autocasts() -> tuple[Autocast, ...]:
    """The states of this thread that are on: a new thread starts without them."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = dict.fromkeys(["cpu", *([accelerator.type] if accelerator is not None else [])])
    return tuple(state for state in map(autocast_on, kinds) if state.enabled)
