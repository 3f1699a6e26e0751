"""The recovery of `prune`, stage by stage; a stage that makes the model worse on the held-out batches is undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from prunella.app.prune_data import Batches, first, part, size
from prunella.app.prune_stages import Running, StageTimer
from prunella.app.stages import Stages
from prunella.errors import CheckFailed, one_line, out_of_resources
from prunella.io.journal import Records
from prunella.io.nested import load_state, save_state
from prunella.measure.clock import now, since
from prunella.model.forward import Logits, Outputs, first_tensor, judged
from prunella.model.state import mode, untouched
from prunella.planning.plan import Plan
from prunella.recovery.batchnorm import absorb_bn
from prunella.recovery.checkpoint import named_tensors, put_tensors_
from prunella.recovery.distill import distill_logits
from prunella.recovery.finetune import Training, finetune
from prunella.recovery.reconstruct import LayerFit, reconstruct
from prunella.search.measured import distance_of, divergence, name_of
from prunella.types import Loss

STEPS, LOOKS, TRAINED_NORMS = 60, 2, 64
"""Most distillation steps; evaluations on held-out batches; batch size from which norms use batch statistics."""
FITTED, ABSORBED, JUDGED = 1024, 256, 256
"""Samples for least squares, for the statistics of norms, and for the distance. ResNet-20 at half of its multiply-adds,
before distillation, two seeds, with 1,024 / 2,048 samples: 80.4 / 80.9 and 81.8 / 81.9 % in 17 / 25 CPU seconds; with
7,680 of them 81.0 % in 81."""
CLIP = 10.0
"""Largest norm of a gradient. Gradients of `T^2 KL` have norms of 2 to 4 in a network that learns well: a smaller limit
is a smaller learning rate."""
LR = 0.02
"""Learning rate of distillation if the pruned model is far from the dense one."""
NEAR = 0.2
"""A divergence of logits below which the learning rate falls, as `LR (d / NEAR)^1.5`. ResNet-20 at 65 % of its
multiply-adds begins at .10 (seed 10, 2,000 images): .004 / .007 / .012 give 85.6 / 86.1 / 85.6 % after 85.6 %, and the
last is undone, since the distance has grown."""
POLYAK, PROBED = 0.2, 2
"""The learning rate as a share of Polyak's step `loss / |gradient|^2`, and the number of batches that tell it: deep
networks have larger gradients. ResNet-20 at half of its multiply-adds: .092, where .02 was best; at 65 %: .097 (.007,
see `NEAR`); ResNet-56 at half: .044, where .0044 and .012 bring the outputs nearer halfway (`_Best.look_between`), .012
not at the end; with seed 10."""
APART = 0.1
"""Least fraction of the way between two states that are both looked at."""
SAME = 1e-3
"""Relative change of a distance by rounding alone."""

_State = tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Recover:
    """How `prune` recovers the quality.

    reconstruct: refit the layers that read pruned units, and recompute the statistics of batch normalizations.
    steps: number of distillation steps; None: chosen by the data and the budget, 0: no distillation.
    lr: learning rate of distillation; None: `LR`, or less if the model is already close to the dense one.
    """

    reconstruct: bool = True
    steps: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Pair:
    """The dense and the pruned model with the data. run: gives the outputs of (model, batch)."""

    dense: nn.Module
    small: nn.Module
    plan: Plan
    data: Batches
    run: Outputs
    seed: int
    expected: list[Any] = field(default_factory=list)
    known: dict[_State, float] = field(default_factory=dict)

    @cached_property
    def held_out(self) -> tuple[Any, ...]:
        """The batches for evaluation."""
        return first(self.data.held_out, JUDGED)

    def judged(self, model: nn.Module, batch: Any) -> Tensor | Logits:
        """The part of the outputs that is compared."""
        return judged(self.run(model, batch), batch)

    @property
    def measure(self) -> str:
        """Name and unit of the distance. Call `distance` before."""
        return name_of(distance_of(self.expected[0]))

    def present(self) -> float:
        """The distance; it is measured again only if the model has changed since `remember`.

        A resumed process must read the same number, because it determines the settings of the training.
        """
        known = self.known.get(self._state())
        self.known.clear()
        return self.distance() if known is None else known

    def remember(self, distance: float) -> None:
        """Store this as the distance of the present model."""
        self.known.clear()
        if (state := self._state()) is not None:
            self.known[state] = distance

    def _state(self) -> _State:
        """Every tensor with its version counter; None for tensors without one."""
        own = [*self.small.parameters(), *self.small.buffers()]
        return None if any(t.is_inference() for t in own) else tuple((id(t), t._version) for t in own)

    def distance(self) -> float:
        """The mean distance to the dense outputs on the held-out batches; infinite if it is not a number."""
        with mode(self.dense, training=False), mode(self.small, training=False), torch.no_grad():
            if not self.expected:
                self.expected.extend(self.judged(self.dense, batch) for batch in self.held_out)
            compare = distance_of(self.expected[0])
            pairs = zip(self.expected, self.held_out, strict=True)
            losses = [compare(expected, self.judged(self.small, batch)) for expected, batch in pairs]
        value = sum(losses) / len(losses)
        return value if math.isfinite(value) else math.inf


def recover_(pair: Pair, how: Recover, timer: StageTimer, stages: Stages) -> None:
    """Recover the pruned model in place, step by step; finished steps are read from the folder."""
    if how.reconstruct:
        stages.recover(1, pair.small, partial(_refitted, pair, timer, stages.records), timer)
    else:
        timer.skip("reconstruct", "recover= excludes it")
    stages.recover(2, pair.small, partial(_distilled, pair, how, timer, stages), timer)


def _refitted(pair: Pair, timer: StageTimer, records: Records) -> dict[str, Any]:
    if timer.left <= 0:
        timer.skip("reconstruct", "the budget is used up")
        return {}
    _reconstructed(pair, timer, records)
    if any(isinstance(module, _BatchNorm) for module in pair.small.modules()):
        with timer.stage("bn") as stage, _kept(pair, stage, SAME):
            count = len(absorb_bn(pair.small, list(first(pair.data.fit, ABSORBED)), loss=pair.run))
            stage.note(f"{count} batch normalizations have the statistics of the data")
    return {}


def _reconstructed(pair: Pair, timer: StageTimer, records: Records) -> None:
    with timer.stage("reconstruct") as stage, _kept(pair, stage):
        data = _few(pair, timer, stage, records)

        def tick(fit: LayerFit, done: int, total: int) -> None:
            stage.tick(done, total)

        fitted = reconstruct(pair.small, pair.dense, data, pair.plan, loss=pair.run, ridge="auto", on_fit=tick)
        skipped = [fit for fit in fitted.fits if fit.skipped]
        stage.note(f"{len(fitted.fits) - len(skipped)} layers")
        if skipped:
            stage.note(f"{len(skipped)} layers not refitted, as {skipped[0].name}: {skipped[0].skipped}")


def _few(pair: Pair, timer: StageTimer, stage: Running, records: Records) -> list[Any]:
    """The batches for the fit that the budget allows; a single batch is split in four, to choose the ridge."""
    batches = list(first(pair.data.fit, FITTED))
    if len(batches) == 1 and size(batches[0]) >= 4:
        count = size(batches[0])
        batches = [part(batches[0], k * count // 4, (k + 1) * count // 4) for k in range(4)]
    if math.isinf(timer.left):
        return batches
    most = records.count("batches of the refit", lambda: max(1, _affordable(pair, 0.7 * timer.left, 8)))
    if most < len(batches):
        stage.note(f"{most} of {len(batches)} batches: budget")
    return batches[:most]


def _affordable(pair: Pair, seconds: float, passes: int) -> int:
    """How many times `passes` passes of the dense model on one batch fit into the time."""
    start = now()
    with mode(pair.dense, training=False), torch.no_grad():
        pair.run(pair.dense, pair.data.fit[0])
    return int(seconds / max(passes * since(start), 1e-6))


def _distilled(pair: Pair, how: Recover, timer: StageTimer, stages: Stages) -> dict[str, Any]:
    steps, why = _steps(pair, how, timer, stages.records)
    if not steps:
        timer.skip("distill", why)
        return {}
    with timer.stage("distill") as stage, _kept(pair, stage, file=stages.best(2), between=True) as kept:

        def look(step: int, loss: float, lr: float) -> None:
            stage.tick(step + 1, steps)
            if (step + 1) % max(1, steps // LOOKS) == 0 and step + 1 < steps:
                kept.look()

        training = Training(
            optimizer=_sgd, lr_schedule=_cosine, clip=CLIP, seed=pair.seed, checkpoint=stages.checkpoint(2)
        )
        loss = _imitation(pair)
        try:
            rate = _rate(pair, how, loss, kept.start)
            stage.note(f"learning rate {rate:.2g}")
            finetune(pair.small, list(pair.data.fit), loss, steps=steps, lr=rate, training=training, on_step=look)
        finally:
            stage.note(f"{steps} steps, {why}" if why else f"{steps} steps")
    return {}


def _rate(pair: Pair, how: Recover, loss: Loss, distance: float) -> float:
    """The learning rate: the given one, otherwise by the distance to the dense outputs and by the gradients."""
    if how.lr is not None:
        return how.lr
    near = min(1.0, distance / NEAR) if distance_of(pair.expected[0]) is divergence else 1.0
    return min(LR, POLYAK * _polyak(pair, loss)) * math.pow(near, 1.5)


def _polyak(pair: Pair, loss: Loss) -> float:
    """`mean loss / mean |gradient|^2` over some batches: the step that would take a loss without noise to zero."""
    trained = [parameter for parameter in pair.small.parameters() if parameter.requires_grad]
    losses, squares = 0.0, 0.0
    with untouched(pair.small, pair.seed), torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(True)
        for batch in pair.data.fit[:PROBED]:
            value = loss(pair.small, batch)
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            losses += value.item()
            squares += sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None)
    step = losses / squares if squares > 0 else math.inf
    return step if step > 0 else math.inf


def _steps(pair: Pair, how: Recover, timer: StageTimer, records: Records) -> tuple[int, str]:
    """The number of steps, and the reason if it is reduced or zero."""
    if how.steps is not None:
        return how.steps, "" if how.steps else "recover= excludes it"
    if not any(parameter.requires_grad for parameter in pair.small.parameters()):
        return 0, "no parameter requires a gradient"
    steps = min(STEPS, 4 * len(pair.data.fit))
    if math.isinf(timer.left):
        return steps, ""
    most = records.count("most steps of distillation", lambda: _affordable(pair, 0.8 * timer.left, 5))
    if most < 4:
        return 0, "the budget leaves no time for it"
    return min(most, steps), "as the budget allows" if most < steps else ""


def _imitation(pair: Pair) -> Loss:
    """KL at temperature 2 for logits, else one minus the cosine. Norms of large batches train; dropout does not."""
    logits = distance_of(pair.expected[0]) is divergence
    by_logits = distill_logits(pair.dense, temperature=2.0, outputs=pair.judged)
    norms = [module for module in pair.small.modules() if isinstance(module, _BatchNorm)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        model.eval()
        for norm in norms:
            norm.train(size(batch) >= TRAINED_NORMS)
        if logits:
            return by_logits(model, batch)
        with mode(pair.dense, training=False), torch.no_grad():
            expected = first_tensor(pair.judged(pair.dense, batch)).flatten(1)
        return (1 - F.cosine_similarity(first_tensor(pair.judged(model, batch)).flatten(1), expected)).mean()

    return loss


def _sgd(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr, momentum=0.9, nesterov=True)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# -- never worse ---------------------------------------------------------------------------------------------------


class _Best:
    """The best state of a model so far. better: whether it is not the first one. start: the distance of the first one.

    file: stores the state, for a call that resumes after a kill.
    """

    def __init__(self, pair: Pair, start: float, file: Path | None) -> None:
        self._measure: Callable[[], float] = pair.distance
        self._small, self._file, self.start = pair.small, file, start
        self._first = self._present()
        self._state, self.distance, self.better = self._first, start, False
        if file is not None and file.is_file():
            kept = load_state(file)
            self._state, self.distance, self.better = kept["model"], kept["distance"], True

    def _present(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in named_tensors(self._small).items()}

    def look(self, slack: float = -SAME) -> float:
        """Store the present state if it is better by more than rounding. slack: how much worse it may be, relative."""
        distance = self._measure()
        if distance <= self.distance * (1 + slack):
            self._state, self.distance, self.better = self._present(), distance, True
            if self._file is not None:
                save_state({"model": self._state, "distance": distance}, self._file)
        return distance

    def look_between(self, last: float) -> None:
        """Look halfway back to the first state, and where the parabola through the three distances is least.

        A short training moves the weights by a gain and by the noise of its batches. Halfway there is most of the gain
        and a quarter of the noise, which counts in a model that was close to the dense one before. last: the distance
        of the present state.
        """
        end = self._present()
        self._move(0.5, end)
        half = self.look()
        where = vertex(self.start, half, last)
        if where is not None and abs(where - 0.5) > APART:
            self._move(where, end)
            self.look()

    def _move(self, fraction: float, to: dict[str, Tensor]) -> None:
        """Load the state at a fraction of the way from the first state; counters and integers are those of its end."""
        moved = {name: value for name, value in to.items() if not torch.equal(value, self._first[name])}
        floats = {name: value for name, value in moved.items() if value.is_floating_point()}
        between = {name: torch.lerp(self._first[name].to(value), value, fraction) for name, value in floats.items()}
        put_tensors_(self._small, to | between)

    def restore(self) -> None:
        """Load the best state into the model."""
        put_tensors_(self._small, self._state)


def vertex(first: float, half: float, last: float) -> float | None:
    """Where between 0 and 1 the parabola through values at 0, 1/2 and 1 is least; None if that is at an end."""
    curvature = 2 * (first - 2 * half + last)
    where = 0.5 + (first - last) / (2 * curvature) if curvature > 0 else 0.0
    return where if 0 < where < 1 else None


@contextmanager
def _kept(
    pair: Pair, stage: Running, slack: float = -SAME, *, file: Path | None = None, between: bool = False
) -> Iterator[_Best]:
    """One stage: the model keeps its best state, possibly that before the stage. slack: tolerance for rounding.

    between: whether states between the first and the last one count too.
    """
    before = pair.present()
    best = _Best(pair, before, file)
    try:
        yield best
    except CheckFailed as error:
        stage.note(f"{'stopped' if best.better else 'undone'}: {error.what}")
    except Exception as error:
        if not _in_train(error, pair.small):
            raise
        stage.note(f"undone: train() of the model failed, {one_line(error)}")
    else:
        last = best.look(slack)
        if between and math.isfinite(last + before):
            best.look_between(last)
        if not best.better:
            gain = "it gains nothing" if last <= before * (1 + SAME) else f"the distance would be {last:.4g}"
            stage.note(f"undone: {gain}")
        elif last > best.distance:
            stage.note("the best state on held-out data is kept, not the last")
    best.restore()
    pair.remember(best.distance)
    stage.compared(before, best.distance, pair.measure)


def _in_train(error: BaseException, model: nn.Module) -> bool:
    """Whether the user's own `train` method raised an error: the model is usable without training."""
    step, inside = error.__traceback__, {id(module) for module in model.modules()}
    while step is not None:
        if step.tb_frame.f_code.co_name == "train" and id(step.tb_frame.f_locals.get("self")) in inside:
            return out_of_resources(error) is None
        step = step.tb_next
    return False
