"""A training run that can start from any step of an earlier run, with the complete training state rewound.

Besides the weights, optimizer moments, the learning-rate schedule, the order of the data and every random generator are
rewound, so that a run from step k repeats the original run bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.batches import no_batches
from prunella.model.rng import RngState, restore_rng_, rng_state, seed_rng_
from prunella.model.unwrap import bare_optimizer, unwrap
from prunella.train.pruner import Pruner

State = dict[str, Tensor]


class Stateful(Protocol):
    """An optimizer, a learning-rate schedule, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class TrainingPoint:
    """The state of a run at one step: the model, all other states, the position in the data, and random states.

    rng: present random state. epoch: random state at the start of the present epoch. offset: batches taken since then.
    """

    step: int
    model: State
    others: list[dict[str, Any]]
    rng: RngState
    epoch: RngState
    offset: int

    def plain(self) -> dict[str, Any]:
        """As nested data, for a file."""
        return {**vars(self)}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Self:
        """The point from the data of `plain()`; 0.1 wrote the random state under the key `dice`."""
        return cls(**{"rng" if key == "dice" else key: value for key, value in plain.items()})


class Session:
    """One run of `total` steps, or its rest from a `TrainingPoint` on; a training function takes its batches from here.

        def train(model, session):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, session.total)
            for x, y in session.steps(loader, optimizer, schedule):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                schedule.step()

    `steps` keeps the masks of the model in force, rewinds its arguments if the session starts after step 0, and repeats
    the data as often as needed. The run may depend only on these arguments, on the global random generators of torch,
    numpy and Python, and on the generator of the loader.

    fresh: start the optimizers with empty moments; the settings (learning rate, decay) are those of the point.
    reseed: shuffle the data from this seed instead of continuing in the order of the point.
    """

    def __init__(
        self,
        model: nn.Module,
        total: int,
        *,
        start: TrainingPoint | None = None,
        keep_at: int | None = None,
        stop: int | None = None,
        fresh: bool = False,
        reseed: int | None = None,
    ) -> None:
        self.model, self.total = unwrap(model), total
        self.start, self.keep_at, self.fresh, self.reseed = start, keep_at, fresh, reseed
        self.end = total if stop is None else stop
        self.kept: TrainingPoint | None = None
        self.rates: list[float] = []
        self.done = False

    def steps(self, data: Iterable[Any], *stateful: Stateful) -> Iterator[Any]:
        """The batches of the session. stateful: every optimizer, learning-rate schedule and scaler of the loop."""
        optimizers = [bare_optimizer(one) for one in stateful if hasattr(one, "param_groups")]
        if not optimizers:
            raise RequestError(
                "session.steps() needs the optimizer", "", "for example session.steps(loader, optimizer)"
            )
        handle = optimizers[0].register_step_pre_hook(self._note_rate)
        with handle, Pruner(self.model, optimizers):
            yield from self._walk(data, stateful)

    def check(self) -> None:
        """`RequestError` if the training function did not take all steps."""
        if not self.done:
            raise RequestError(
                f"the training function took {len(self.rates)} steps and stopped before step {self.end}",
                "it left the loop early, or did not use session.steps()",
                "loop over all batches of session.steps(loader, optimizer), and set steps= in the spec",
            )

    def _walk(self, data: Iterable[Any], stateful: tuple[Stateful, ...]) -> Iterator[Any]:
        step = self._rewind(stateful)
        if self.reseed is not None:
            seed_rng_(self.reseed, data)
        epoch, offset, skip = rng_state(data), 0, 0
        if self.start is not None and self.reseed is None:
            epoch, skip = self.start.epoch, self.start.offset
            restore_rng_(epoch, data)
        stream = iter(data)
        for _ in range(skip):
            next(stream)
        if self.start is not None and self.reseed is None:
            restore_rng_(self.start.rng, data)
            offset = skip
        while True:
            if step == self.keep_at:
                self.kept = self._point(step, stateful, rng_state(data), epoch, offset)
            if step == self.end:
                break
            try:
                batch = next(stream)
            except StopIteration:
                if offset == 0:
                    raise no_batches() from None
                epoch, offset, stream = rng_state(data), 0, iter(data)
                continue
            offset += 1
            yield batch
            step += 1
        self.done = True

    def _rewind(self, stateful: tuple[Stateful, ...]) -> int:
        """Restore the saved state of every stateful object, and return the step."""
        if self.start is None:
            return 0
        if len(stateful) != len(self.start.others):
            raise RequestError(f"session.steps() got {len(stateful)} states to rewind, {len(self.start.others)} before")
        for one, state in zip(stateful, self.start.others, strict=True):
            state = copy.deepcopy(state)
            if self.fresh and isinstance(one, Optimizer):
                state["state"] = {}
            one.load_state_dict(state)
        return self.start.step

    def _point(
        self, step: int, stateful: tuple[Stateful, ...], now: RngState, epoch: RngState, offset: int
    ) -> TrainingPoint:
        others = [copy.deepcopy(one.state_dict()) for one in stateful]
        return TrainingPoint(step, snapshot(self.model), others, now, epoch, offset)

    def _note_rate(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


def snapshot(model: nn.Module) -> State:
    """A copy of all parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in unwrap(model).state_dict().items()}


def put_(model: nn.Module, state: State) -> None:
    """Copy a snapshot into the model, bit for bit."""
    with torch.no_grad():
        unwrap(model).load_state_dict(state)
