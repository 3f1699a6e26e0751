"""Checkpoints of a training: its full state in one file, written every minute, so that a killed training resumes.

The file holds weights, optimizer, losses, the position in the data, the random states and the identity of the training;
a checkpoint of another training is refused, with the differences. A resumed training is bit-identical to one without
a stop if the data is repeatable: a list, or a loader whose order comes from random generators of torch, numpy, Python
or its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import BadInput, RequestError
from prunella.io.identity import Identity
from prunella.io.nested import load_state, save_state
from prunella.measure.clock import now, since
from prunella.model.batches import batches
from prunella.model.rng import RngState, restore_rng_, rng_state

SECONDS = 60.0
"""Seconds between two writes."""


@dataclass(frozen=True)
class DataPosition:
    """The random state at the start of the present epoch, and the number of its batches used so far."""

    epoch: RngState
    offset: int


class Checkpoint:
    """The file of one training. Without a path nothing is written or read."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        model: nn.Module,
        optimizer: Optimizer,
        identify: Callable[[], Identity],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self._model, self._optimizer = model, optimizer
        self._identity = identify() if self.path else Identity({})
        self._written = now()
        self._start: DataPosition | None = None
        self._data: DataPosition | None = None
        self._rng: RngState | None = None
        if self.path and self.path.exists():
            self._restore_(self.path)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self.losses)

    def batches(self, data: Iterable[Any], steps: int) -> Iterator[Any]:
        """The batches of the remaining steps, starting over when the data ends."""
        left = steps - self.step
        while left > 0:
            epoch, offset, stream = self._epoch(data)
            for number, batch in enumerate(stream, offset + 1):
                self._data = DataPosition(epoch, number)
                yield batch
                left -= 1
                if not left:
                    return

    def _epoch(self, data: Iterable[Any]) -> tuple[RngState, int, Iterator[Any]]:
        """The random state at the start of an epoch, and its batches; after a kill, only the remaining ones."""
        start, self._start = self._start, None
        if start is None or self._rng is None:
            return (rng_state(data) if self.path else {}), 0, batches(data)
        restore_rng_(start.epoch, data)
        stream = batches(data)
        for _ in range(start.offset):
            next(stream, None)
        restore_rng_(self._rng, data)
        return start.epoch, start.offset, stream

    def done(self, loss: float, rate: float, data: Iterable[Any]) -> None:
        """Record a finished step; write the file if the last write is long ago."""
        self.losses.append(loss)
        self.rates.append(rate)
        if self.path and since(self._written) >= SECONDS:
            self._write(self.path, data)
            self._written = now()

    def _write(self, path: Path, data: object) -> None:
        assert self._data is not None, "a step is done"
        state = {
            "identity": dict(self._identity.parts),
            "losses": torch.tensor(self.losses, dtype=torch.float64, device="cpu"),
            "rates": torch.tensor(self.rates, dtype=torch.float64, device="cpu"),
            "model": named_tensors(self._model),
            "optimizer": self._optimizer.state_dict(),
            "rng": rng_state(data),
            "epoch": self._data.epoch,
            "offset": self._data.offset,
        }
        save_state(state, path)

    def _restore_(self, path: Path) -> None:
        state = load_state(path)
        try:
            before = Identity(dict(state["identity"]))
            if before.digest != self._identity.digest:
                why = f"it holds another training: {before.difference(self._identity)}"
                raise RequestError(f"{path} is not continued", why, "remove it, or repeat the earlier call unchanged")
            put_tensors_(self._model, state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.losses, self.rates = state["losses"].tolist(), state["rates"].tolist()
            self._start, self._rng = DataPosition(state["epoch"], int(state["offset"])), state["rng"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RequestError | BadInput):
                raise
            why = f"{type(error).__name__}: {error}"
            raise BadInput(
                f"{path} is not a checkpoint of a training", why, "remove the file to train again"
            ) from error


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, including those that its state dict leaves out."""
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def put_tensors_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy the tensors of `named_tensors` into the model, bit for bit. Errors: BadInput for those of another model."""
    own = named_tensors(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise BadInput("a stored state does not fit the model", "other names or shapes", "remove it to make it again")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
