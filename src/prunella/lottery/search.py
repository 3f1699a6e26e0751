"""Lottery tickets: train, prune, rewind and repeat, with controls; a killed run can be resumed."""

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
from prunella.lottery.session import TrainingPoint, put_, snapshot
from prunella.lottery.training import TrainingSpec
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
    """After each round rewind the surviving weights, and the whole training state, to step `step`.

    `theta <- m * theta_k`; moments, learning rate, data order and random generators are those of step k too. step: from
    0 (the original ticket) up to one below the steps of the training.

    Use: step 0 for the original experiment; a few hundred steps for deep networks. Avoid: if only accuracy matters:
    `RateRewind` is as good or better.
    """

    step: int = 0


@training(source="Renda et al. 2020, arXiv:2003.02389")
@dataclass(frozen=True)
class RateRewind:
    """After each round keep the surviving weights, and replay the learning rates from step `step` to the end.

    `lr[step:T]` again, with the data order and the random generators of this step, and empty moments. step: from 0 up
    to one below the steps of the training; 0 replays the whole training.

    Use: the most accurate sparse network for the same retraining. Avoid: testing whether early weights are a ticket.
    """

    step: int = 0


Rewind = WeightRewind | RateRewind


@dataclass(frozen=True)
class Round:
    """One training: number of the round, kept and prunable weights, quality, learning rate of every step, controls."""

    number: int
    kept: int
    total: int
    score: float | None
    rates: tuple[float, ...] = field(repr=False)
    controls: Mapping[Control, float | None] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept."""
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class Tickets(Generic[M]):
    """The result of `find_ticket`.

    ticket: the rewound weights under the last mask, before the last training. trained: the model after the last
    training. Both carry their masks. rounds: the dense training first.
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
    spec: TrainingSpec,
    *,
    prune: Prune,
    rounds: int,
    rewind: Rewind = WeightRewind(0),
    controls: Controls = Controls(),  # noqa: B008
    folder: str | os.PathLike[str] | None = None,
) -> Tickets[M]:
    """Train, prune, rewind and train again, `rounds` times, and train the controls of the last mask in the same way.

    `f(x; m * theta_k)`: surviving weights are bit-equal to `theta_k`. `model` does not change; its weights are
    `theta_0`. Data: the data of `spec`.

    spec: training function, number of steps, evaluation and seed. prune: the plan of each round, `imp(batch)` or your
    own function of (model, round). rounds: at least 1. rewind: `WeightRewind(k)` or `RateRewind(k)`. controls: which
    controls after which rounds; `REINIT` trains the mask on new weights from step 0, `SHUFFLE` permutes the mask inside
    each layer. folder: stores every finished training as a complete file. Called again with the same arguments, a
    killed run resumes after the last finished training, with bit-identical results.

    Errors: RequestError if the folder holds another run or an argument is out of range.

    Use: research on sparse training with small networks. Avoid: budgets below `rounds + 1` trainings: `Pruner` with
    `cubic` prunes within one training.
    """
    if rounds < 1:
        raise RequestError(f"cannot prune {rounds} rounds", "at least one round is needed", "for example rounds=15")
    search = _Search(model, spec, prune, rewind, controls)
    with open_steps(folder, lambda: search.identity(model)) as steps:
        return search.run(rounds, steps)


class _Search(Generic[M]):
    """One call of `find_ticket`."""

    def __init__(
        self,
        model: M,
        spec: TrainingSpec,
        prune: Prune,
        rewind: Rewind,
        controls: Controls,
    ) -> None:
        if not 0 <= rewind.step < spec.steps:
            raise RequestError(f"cannot rewind to step {rewind.step} of {spec.steps}", "it lies outside the training")
        if next(records(model), None) is not None:
            raise RequestError("the model carries masks already", "a ticket starts from a dense model", "finalize it")
        self.spec, self.prune, self.rewind, self.controls = spec, prune, rewind, controls
        self.work = copied(model)
        self.first = snapshot(model)

    def identity(self, model: M) -> Identity:
        """Everything that determines a training, without the number of rounds and the kinds of controls."""
        spec = self.spec
        trained = {"steps": spec.steps, "seed": spec.seed, "training": spec.train, "metric": spec.evaluate}
        asked = {"rewind": repr(self.rewind), "prune": self.prune, "fresh": self.controls.fresh}
        return identify({**model_parts(model), **trained, **asked, "threads": torch.get_num_threads()})

    def run(self, rounds: int, steps: Steps) -> Tickets[M]:
        done = steps.once("round-00", self._dense)
        self.point = TrainingPoint(**done["point"])
        results = [_round(0, done, {})]
        for number in range(1, rounds + 1):
            before = done
            done = steps.once(f"round-{number:02d}", partial(self._train, number, before))
            scores = self._controls(number, done, steps) if self.controls.due(number, rounds) else {}
            results.append(_round(number, done, scores))
        self._load(before["model"], done["masks"])
        ticket = copied(self._rewound())
        self._load(done["model"], done["masks"])
        return Tickets(tuple(results), ticket, self.work)

    def _dense(self) -> dict[str, Any]:
        self.spec.score(self.work)  # so that a broken evaluation fails before the training
        session = self.spec.run(self.work, self.spec.session(self.work, keep_at=self.rewind.step))
        assert session.kept is not None
        return {**self._result(session.rates, 0, 0), "point": session.kept.plain()}

    def _train(self, number: int, before: Mapping[str, Any]) -> dict[str, Any]:
        """Prune the result of the previous round, rewind, and train."""
        work = self._load(before["model"], before["masks"])
        with seeded(self.spec.seed + number):
            plan = self.prune(work, number)
        if plan.cuts and Control.SHUFFLE in self.controls.kinds:
            raise RequestError(
                "masks of whole channels cannot be shuffled weight by weight",
                "the control would not be structured",
                "pass controls=Controls(kinds=(Control.REINIT,))",
            )
        total = sum(parameter.numel() for parameter in plan_masks(unwrap(work), plan))
        apply_(work, plan)
        removed = sum({p: int((~k.unpack()).sum()) for _, p, k in records(work)}.values())
        self._rewound()
        fresh = isinstance(self.rewind, RateRewind)
        session = self.spec.session(work, start=self.point)
        session.fresh = fresh
        self.spec.run(work, session)
        return self._result(session.rates, total - removed, total)

    def _rewound(self) -> M:
        """The initial weights of the next training, under the masks of the model."""
        if isinstance(self.rewind, WeightRewind):
            put_(self.work, self.point.model)
        return reapply_(self.work)

    def _controls(self, number: int, done: Mapping[str, Any], steps: Steps) -> dict[Control, float | None]:
        scores: dict[Control, float | None] = {}
        for kind in self.controls.kinds:
            name = f"control-{kind.value}-{number:02d}"
            result = steps.once(name, partial(self._control, kind, number, done))
            scores[kind] = result["score"]
        return scores

    def _control(self, kind: Control, number: int, done: Mapping[str, Any]) -> dict[str, Any]:
        """Train a control in the same way as the ticket. New weights have no earlier step: they start at step 0."""
        work, seed = self._load(self.first, done["masks"]), self.spec.seed + number
        start = None
        if kind is Control.REINIT:
            reinit_(work, seed + 1, self.controls.fresh)
        else:
            shuffle_masks_(work, seed)
            if isinstance(self.rewind, WeightRewind):
                put_(work, self.point.model)
                start = self.point
        reapply_(work)
        session = self.spec.run(work, self.spec.session(work, start=start))
        return self._result(session.rates, int(done["kept"]), int(done["total"]))

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
            "rates": torch.tensor(rates, dtype=torch.float64, device="cpu"),
            "kept": kept,
            "total": total,
            "score": self.spec.score(self.work),
        }


def _round(number: int, done: Mapping[str, Any], scores: Mapping[Control, float | None]) -> Round:
    return Round(number, done["kept"], done["total"], done["score"], tuple(done["rates"].tolist()), scores)


def _cell(score: float | None) -> str:
    return MISSING if score is None else significant(score)
