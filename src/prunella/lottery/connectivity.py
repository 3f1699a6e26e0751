"""Linear mode connectivity: the error barrier between two trained networks, and the instability of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.io.checkpoint import Names
from prunella.io.nested import equal
from prunella.lottery.session import Session, State, snapshot
from prunella.lottery.training import TrainingSpec
from prunella.model.copying import copied
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.model.user_code import number_of
from prunella.recovery.batchnorm import recalibrate_bn
from prunella.registry.method import metric


@dataclass(frozen=True)
class Barrier:
    """Errors on the line `a first + (1 - a) second`, at the `positions` a in [0, 1]."""

    positions: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def height(self) -> float:
        """`max_a E(a) - (E(0) + E(1)) / 2`."""
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2

    def __str__(self) -> str:
        return f"barrier {self.height:.4g} between errors {self.errors[0]:.4g} and {self.errors[-1]:.4g}"


@metric(source="Frankle et al. 2020, arXiv:1912.05671")
def barrier(
    model: nn.Module,
    first: State,
    second: State,
    evaluate: Callable[[nn.Module], float],
    *,
    points: int = 11,
    data: Iterable[Any] | None = None,
) -> Barrier:
    """Rise of the error on the straight line between two networks.

    `max_a E(a t1 + (1 - a) t2) - (E(t1) + E(t2)) / 2`: 0 for a network and itself, near 0 where both lie in one basin.
    Parameters and floating buffers are interpolated, integer buffers are those of `second`. The model does not change.

    first, second: state dicts of this model. evaluate: error of a model in evaluation mode, lower is better, such as
    1 - accuracy. points: positions on the line, ends included, from 3 up. data: batches that recalibrate batch
    normalization at every point, ends included; without data the statistics of the ends are interpolated, which
    overstates the barrier.
    Errors: RequestError for too few points, or states of another model.

    Use: checking how early training becomes stable, and whether two sparse networks lie in one basin. Avoid: networks
    with permuted neurons: the line between them has no meaning.
    """
    if points < 3:
        raise RequestError(f"{points} points are too few", "both ends and a point between are needed", "points=11")
    model = unwrap(model)
    before = snapshot(model)
    first, second = (_bare_names(state, before) for state in (first, second))
    if not before.keys() == first.keys() == second.keys():
        todo = "pass the state dicts of two copies of the model"
        raise RequestError("the states are not of this model", "their names differ", todo)
    positions = tuple(index / (points - 1) for index in range(points))
    errors = []
    try:
        with mode(model, training=False), torch.no_grad():
            for position in positions:
                model.load_state_dict({name: _between(first[name], second[name], position) for name in before})
                if data is not None:
                    recalibrate_bn(model, data)
                errors.append(number_of(evaluate(model), "evaluate="))
    finally:
        model.load_state_dict(before)
    return Barrier(positions, tuple(errors))


def _bare_names(state: State, own: State) -> State:
    """The state dict under the names of the bare model, if it is that of a wrapped one."""
    if state.keys() == own.keys():
        return state
    return Names.of(state, frozenset(own)).renamed(state, "the state dict")


@metric(source="Frankle et al. 2020, arXiv:1912.05671")
def instability(
    model: nn.Module,
    spec: TrainingSpec,
    error: Callable[[nn.Module], float],
    *,
    step: int = 0,
    seeds: tuple[int, int] = (1, 2),
    points: int = 11,
    data: Iterable[Any] | None = None,
) -> Barrier:
    """Barrier between two trainings that share the first `step` steps and then see different data orders.

    Both copies start from one `theta_k`, moments and learning rate included; only the random generators differ. Masks
    of the model stay in force, so that a ticket can be tested. `model` does not change. Data: the data of `spec`.

    error: of a model, lower is better. step: k, from 0 up to one below the steps of the spec. seeds: of the two data
    orders. points, data: as for `barrier`.
    Errors: RequestError for a step outside the training, or equal copies.

    Use: choosing k for `WeightRewind`: the smallest k with a barrier near 0. Avoid: data in a fixed order: the two
    copies are then equal, and the call is refused.
    """
    if not 0 <= step < spec.steps:
        raise RequestError(f"cannot branch at step {step} of {spec.steps}", "it lies outside the training")
    trunk = copied(model)
    point = spec.run(trunk, Session(trunk, spec.steps, keep_at=step, stop=step)).kept
    ends = []
    for seed in seeds:
        branch = copied(trunk)
        spec.run(branch, Session(branch, spec.steps, start=point, reseed=seed))
        ends.append(snapshot(branch))
    if equal(ends[0], ends[1]):
        raise RequestError(
            "both copies ended with the same weights",
            "the order of the data does not depend on the random generators, or the seeds are equal",
            "pass a shuffling loader and two seeds",
        )
    return barrier(trunk, ends[0], ends[1], error, points=points, data=data)


def _between(first: Tensor, second: Tensor, position: float) -> Tensor:
    """`a first + (1 - a) second`; exact where both are equal, and at the ends."""
    if not first.is_floating_point():
        return second
    return torch.lerp(second, first, position)
