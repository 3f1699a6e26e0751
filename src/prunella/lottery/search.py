"""Lottery tickets: train, prune, rewind, and again; beside their controls, and resumable after a kill."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.io.identity import Identity, identify, model_parts
from prunella.lottery.folder import Steps, open_steps
from prunella.lottery.imp import Prune
from prunella.lottery.session import Point, put_, snapshot
from prunella.lottery.training import Course
from prunella.measure.text import MISSING, percent, significant, table
from prunella.model.copying import copied
from prunella.model.masks import forget_masks_, masks_of, reapply_, record_, records
from prunella.model.rng import seeded
from prunella.model.unwrap import unwrap
from prunella.registry.method import training
from prunella.transform.apply import apply_, plan_masks
from prunella.transform.controls import Control, Controls, reinit_, shuffle_masks_
from prunella.types import Mask

M = TypeVar("M", bound=nn.Module)


@training(source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671")
@dataclass(frozen=True)
class WeightRewind:
    """After each round survivors go back to the weights they had at step `step`, and everything else with them.

    `theta <- m * theta_k`; moments, learning rate, data order and random generators are those of step k too. step: from
    0 (the original ticket) up to one below the steps of the training.

    Use: step 0 for the original question; a few hundred steps where the network is deep. Avoid: when only accuracy
    counts: `RateRewind` is as good or better.
    """

    step: int = 0


@training(source="Renda et al. 2020, arXiv:2003.02389")
@dataclass(frozen=True)
class RateRewind:
    """After each round survivors keep their weights, and the learning rates of steps `step` to the end are replayed.

    `lr[step:T]` again, with the data order and generators of that step and empty moments. step: from 0 up to one below
    the steps of the training; 0 replays all of it.

    Use: the most accurate sparse network for the same retraining. Avoid: asking whether early weights were a ticket.
    """

    step: int = 0


Rewind = WeightRewind | RateRewind


@dataclass(frozen=True)
class Round:
    """One training: which round, weights kept of all that may go, quality, learning rate of every step, controls."""

    number: int
    kept: int
    total: int
    score: float | None
    rates: tuple[float, ...] = field(repr=False)
    controls: Mapping[Control, float | None] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Part that is kept."""
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class Tickets(Generic[M]):
    """What a search found. ticket: the rewound weights under the last mask, as they were before the last training.
    trained: the same after it. Both carry their masks. rounds: the dense training first.
    """

    rounds: tuple[Round, ...]
    ticket: M
    trained: M

    def __str__(self) -> str:
        kinds = [kind for kind in Control if any(kind in one.controls for one in self.rounds)]
        rows = [
            (one.number, percent(one.density, 2), *map(_cell, (one.score, *map(one.controls.get, kinds))))
            for one in self.rounds
        ]
        header = ("round", "density", "ticket", *(kind.value for kind in kinds))
        return table(header, rows, right=range(len(header)))


@training(source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671", status="stable")
def find_ticket(
    model: M,
    course: Course,
    *,
    prune: Prune,
    rounds: int,
    rewind: Rewind = WeightRewind(0),
    controls: Controls = Controls(),  # noqa: B008
    folder: str | os.PathLike[str] | None = None,
) -> Tickets[M]:
    """Train, prune, rewind and train again, `rounds` times, and train the controls of the last mask the same way.

    `f(x; m * theta_k)`: survivors are bit-equal to `theta_k`. `model` itself is not changed: it gives `theta_0`. Data:
    what the course trains on.

    course: how to train, for how long, by what to judge, and the seed. prune: which weights go, `imp(batch)` or your
    own function of (model, round). rounds: at least 1. rewind: `WeightRewind(k)` or `RateRewind(k)`. controls: which
    controls after which rounds; `REINIT` trains the mask on new weights from step 0, `SHUFFLE` permutes the mask inside
    each layer. folder: every training that is done is kept there as a complete file; called again with the same
    arguments, a run that was killed goes on from the last and ends with the same bits.

    Errors: RequestError when the folder holds another run or the request makes no sense.

    Use: studying when sparse training works; small networks. Avoid: budgets below `rounds + 1` trainings: `Pruner` with
    `cubic` prunes within one.
    """
    if rounds < 1:
        raise RequestError(f"cannot prune {rounds} rounds", "at least one is needed", "for example rounds=15")
    found = _Search(model, course, prune, rewind, controls)
    with open_steps(folder, lambda: found.identity(model)) as steps:
        return found.run(rounds, steps)


class _Search(Generic[M]):
    """One call of `find_ticket`."""

    def __init__(
        self,
        model: M,
        course: Course,
        prune: Prune,
        rewind: Rewind,
        controls: Controls,
    ) -> None:
        if not 0 <= rewind.step < course.steps:
            raise RequestError(f"cannot rewind to step {rewind.step} of {course.steps}", "it lies outside the training")
        if masks_of(model):
            raise RequestError("the model carries masks already", "a ticket starts from a dense model", "finalize it")
        self.course, self.prune, self.rewind, self.controls = course, prune, rewind, controls
        self.work = copied(model)
        self.first = snapshot(model)

    def identity(self, model: M) -> Identity:
        """All that decides a training. Neither the number of rounds nor the kinds of controls do."""
        course = self.course
        trained = {"steps": course.steps, "seed": course.seed, "training": course.train, "metric": course.evaluate}
        asked = {"rewind": repr(self.rewind), "prune": self.prune, "fresh": self.controls.fresh}
        return identify({**model_parts(model), **trained, **asked, "threads": torch.get_num_threads()})

    def run(self, rounds: int, steps: Steps) -> Tickets[M]:
        done = steps.once("round-00", self._dense)
        self.point = Point(**done["point"])
        found = [_round(0, done, {})]
        for number in range(1, rounds + 1):
            before = done
            done = steps.once(f"round-{number:02d}", partial(self._train, number, before))
            scores = self._controls(number, done, steps) if self.controls.due(number, rounds) else {}
            found.append(_round(number, done, scores))
        self._load(before["model"], done["masks"])
        ticket = copied(self._rewound())
        self._load(done["model"], done["masks"])
        return Tickets(tuple(found), ticket, self.work)

    def _dense(self) -> dict[str, Any]:
        lap = self.course.run(self.work, self.course.lap(self.work, keep_at=self.rewind.step))
        assert lap.kept is not None
        return {**self._result(lap.rates, 0, 0), "point": lap.kept.plain()}

    def _train(self, number: int, before: Mapping[str, Any]) -> dict[str, Any]:
        """Prune what the round before left, rewind, train."""
        work = self._load(before["model"], before["masks"])
        with seeded(self.course.seed + number):
            made = self.prune(work, number)
        if made.cuts and Control.SHUFFLE in self.controls.kinds:
            raise RequestError(
                "masks of whole channels cannot be shuffled weight by weight",
                "the control would not be structured any more",
                "pass controls=Controls(kinds=(Control.REINIT,))",
            )
        total = sum(parameter.numel() for parameter in plan_masks(unwrap(work), made))
        apply_(work, made)
        gone = sum({p: int((~k.unpack()).sum()) for _, p, k in records(work)}.values())
        self._rewound()
        fresh = isinstance(self.rewind, RateRewind)
        lap = self.course.lap(work, start=self.point)
        lap.fresh = fresh
        self.course.run(work, lap)
        return self._result(lap.rates, total - gone, total)

    def _rewound(self) -> M:
        """The weights from which the next training starts, under the masks that the model carries."""
        if isinstance(self.rewind, WeightRewind):
            put_(self.work, self.point.model)
        return reapply_(self.work)

    def _controls(self, number: int, done: Mapping[str, Any], steps: Steps) -> dict[Control, float | None]:
        found: dict[Control, float | None] = {}
        for kind in self.controls.kinds:
            name = f"control-{kind.value}-{number:02d}"
            made = steps.once(name, partial(self._control, kind, number, done))
            found[kind] = made["score"]
        return found

    def _control(self, kind: Control, number: int, done: Mapping[str, Any]) -> dict[str, Any]:
        """Train a control as the ticket was. New weights have no earlier step: they are trained from step 0."""
        work, seed = self._load(self.first, done["masks"]), self.course.seed + number
        start = None
        if kind is Control.REINIT:
            reinit_(work, seed + 1, self.controls.fresh)
        else:
            shuffle_masks_(work, seed)
            if isinstance(self.rewind, WeightRewind):
                put_(work, self.point.model)
                start = self.point
        reapply_(work)
        lap = self.course.run(work, self.course.lap(work, start=start))
        return self._result(lap.rates, int(done["kept"]), int(done["total"]))

    def _load(self, state: dict[str, Any], masks: Mapping[str, Mask]) -> M:
        forget_masks_(self.work)
        put_(self.work, state)
        named = dict(unwrap(self.work).named_parameters(remove_duplicate=False))
        record_(self.work, {named[name]: mask.to(named[name].device) for name, mask in masks.items()})
        return reapply_(self.work)

    def _result(self, rates: list[float], kept: int, total: int) -> dict[str, Any]:
        return {
            "model": snapshot(self.work),
            "masks": masks_of(self.work),
            "rates": torch.tensor(rates, dtype=torch.float64),
            "kept": kept,
            "total": total,
            "score": self.course.score(self.work),
        }


def _round(number: int, done: Mapping[str, Any], scores: Mapping[Control, float | None]) -> Round:
    return Round(number, done["kept"], done["total"], done["score"], tuple(done["rates"].tolist()), scores)


def _cell(score: float | None) -> str:
    return MISSING if score is None else significant(score)
