"""One walk over the data for all layers: forward passes that pause at every layer until the layer has been refitted.

Each pass runs in a thread of its own, and only one thread runs at a time. The activations of a paused pass are the
kept states: when all batches have reached a layer, the layer is solved, its output is computed again with the new
weights, and the passes go on. Without the pauses every layer would need a pass of its own from the input of the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from prunella.errors import NotSupported
from prunella.model.autocast import Autocast, all_entered, autocasts
from prunella.model.copying import copied
from prunella.model.observed_reads import Read
from prunella.model.watch import Stop, Watch

_PATIENCE = 2.0
"""Seconds without processor time after which a pass counts as blocked."""


class Stuck(Exception):
    """The passes of several batches block each other."""


class PausedPass:
    """A forward pass that pauses at every read of `weights`.

    run: the pass, without arguments. It runs without gradients, under the autocast of the calling thread.
    """

    def __init__(self, run: Callable[[], object], weights: Iterable[nn.Parameter]) -> None:
        self._run, self._weights = run, list(weights)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._read: Read | None = None
        self._error: BaseException | None = None
        self._ends, self._alive = False, True
        self._settings = _settings()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def next(self) -> Read | None:
        """Continue to the next read; None at the end of the pass. An error of the pass is raised here.

        Errors: Stuck for a pass that waits for something that another pass holds.
        """
        if not self._alive:
            return None
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        idle = 0
        while not self._paused.acquire(timeout=_PATIENCE / 4):
            before = _used()
            if self._paused.acquire(timeout=_PATIENCE / 4):
                break
            idle = idle + 1 if _used() - before < 0.01 * _PATIENCE else 0
            if idle == 4:
                raise Stuck
        if self._error is not None:
            raise self._error
        return self._read

    def end(self) -> None:
        """End the pass at its present position."""
        self._ends = True
        self._go.release()

    def close(self) -> None:
        """End the pass and wait for its end."""
        self.end()
        while self._thread.is_alive():  # false for a thread that was not started
            self._go.release()
            self._thread.join(0.01)

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._ends:
                watch = Watch(self._weights, self._pause)
                autocast, inference = self._settings
                with torch.inference_mode(inference), torch.no_grad(), all_entered(autocast), watch:
                    self._run()
                watch.finish()
        except Stop:
            pass
        except BaseException as error:
            self._error = None if self._ends else error
        self._read, self._alive = None, False
        self._paused.release()

    def _pause(self, read: Read) -> None:
        if self._ends:
            raise Stop
        self._read = read
        self._paused.release()
        self._go.acquire()
        self._read = None
        if self._ends:
            raise Stop


class Passes:
    """The paused passes of several batches through the dense and the small model, closed at the end of a `with`."""

    def __init__(
        self,
        batches: Iterable[Any],
        run: Callable[[nn.Module, Any], object],
        models: tuple[nn.Module, nn.Module],
        weights: tuple[Iterable[nn.Parameter], Iterable[nn.Parameter]],
    ) -> None:
        sides = [(model, list(watched)) for model, watched in zip(models, weights, strict=True)]
        try:
            self.pairs = [
                tuple(PausedPass(_bound(run, _own(model), batch), watched) for model, watched in sides)
                for batch in batches
            ]
        except NotSupported as error:  # a module that cannot be copied
            raise Stuck from error

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        every = [paused for pair in self.pairs for paused in pair]
        for paused in every:  # all, before one is waited for: it may wait for what another one holds
            paused.end()
        for paused in every:
            paused.close()


def _used() -> float:
    """Seconds that this process has used a processor."""
    return sum(os.times()[:2])


def _own(model: nn.Module) -> nn.Module:
    """Separate modules with the same parameters and buffers: each pass has its own module attributes."""
    return copied(model, shared=[*model.parameters(), *model.buffers()])


def _bound(run: Callable[[nn.Module, Any], object], model: nn.Module, batch: Any) -> Callable[[], object]:
    return lambda: run(model, batch)


def _settings() -> tuple[tuple[Autocast, ...], bool]:
    """What a new thread does not inherit: autocast, and inference mode."""
    return autocasts(), torch.is_inference_mode_enabled()
