"""One walk over the data for all layers: forward passes that pause at every layer until the layer has been refitted.

Each pass runs in a thread of its own, and only one thread runs at a time. The activations of a paused pass are the
kept states: when all batches have reached a layer, the layer is solved, its output is computed again with the new
weights, and the passes go on. Without the pauses every layer would need a pass of its own from the input of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from prunella.model.watch import Read, Stop, Watch


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
        self._thread.start()

    def next(self) -> Read | None:
        """Go on to the next read; None at the end of the pass. An error of the pass is raised here."""
        if not self._alive:
            return None
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._read

    def close(self) -> None:
        """End the pass, wherever it is."""
        self._ends = True
        while self._alive:
            self._go.release()
            self._paused.acquire()
        self._thread.join()

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._ends:
                watch = Watch(self._weights, self._pause)
                device, enabled, dtype, inference = self._settings
                with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device, dtype, enabled), watch:
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
        self.pairs = [
            tuple(PausedPass(_bound(run, model, batch), watched) for model, watched in sides) for batch in batches
        ]

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pair in self.pairs:
            for paused in pair:
                paused.close()


def _bound(run: Callable[[nn.Module, Any], object], model: nn.Module, batch: Any) -> Callable[[], object]:
    return lambda: run(model, batch)


def _settings() -> tuple[str, bool, torch.dtype, bool]:
    """What a new thread does not inherit: autocast (device, enabled, dtype), and inference mode."""
    device = "cuda" if torch.cuda.is_available() and torch.is_autocast_enabled("cuda") else "cpu"
    return (
        device,
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.is_inference_mode_enabled(),
    )
