"""The recovery of `prune`, stage by stage; no stage leaves a model that is worse on the held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from prunella.app.prune_data import Batches, part, size
from prunella.app.prune_stages import Running, StageTimer
from prunella.errors import CheckFailed
from prunella.measure.clock import now, since
from prunella.model.forward import Outputs, first_tensor
from prunella.model.state import mode
from prunella.planning.plan import Plan
from prunella.recovery.batchnorm import absorb_bn
from prunella.recovery.distill import distill_logits
from prunella.recovery.finetune import Training, finetune
from prunella.recovery.reconstruct import LayerFit, reconstruct
from prunella.search.measured import distance_of, divergence, name_of
from prunella.types import Loss

STEPS, LOOKS, TRAINED_NORMS = 60, 4, 64
"""Most steps of distillation; how often the held-out batches are looked at; batch size from which norms train."""
SAME = 1e-3
"""Relative change of a distance that rounding alone makes."""


@dataclass(frozen=True)
class Recover:
    """How `prune` recovers the quality.

    reconstruct: refit the layers that read what was cut, and give batch normalizations the statistics of the data.
    steps: of distillation after that; None for as many as the data and the budget suggest, 0 for none. lr: of these.
    """

    reconstruct: bool = True
    steps: int | None = None
    lr: float = 0.01


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

    @property
    def measure(self) -> str:
        """What the distance is, with its unit. Call `distance` before."""
        return name_of(distance_of(self.expected[0]))

    def distance(self) -> float:
        """The mean distance to the dense outputs on the held-out batches; infinite if it is not a number."""
        with mode(self.dense, training=False), mode(self.small, training=False), torch.no_grad():
            if not self.expected:
                self.expected.extend(self.run(self.dense, batch) for batch in self.data.held_out)
            compare = distance_of(self.expected[0])
            pairs = zip(self.expected, self.data.held_out, strict=True)
            losses = [compare(expected, self.run(self.small, batch)) for expected, batch in pairs]
        value = sum(losses) / len(losses)
        return value if math.isfinite(value) else math.inf


def recover_(pair: Pair, how: Recover, timer: StageTimer) -> None:
    """Recover the pruned model in place."""
    if not how.reconstruct:
        timer.skip("reconstruct", "recover= does not ask for it")
    elif timer.left <= 0:
        timer.skip("reconstruct", "the budget is used up")
    else:
        _reconstructed(pair, timer)
        if any(isinstance(module, _BatchNorm) for module in pair.small.modules()):
            with timer.stage("absorb") as stage, _kept(pair, stage, SAME):
                count = len(absorb_bn(pair.small, list(pair.data.fit), loss=pair.run))
                stage.note(f"{count} batch normalizations have the statistics of the data")
    _distilled(pair, how, timer)


def _reconstructed(pair: Pair, timer: StageTimer) -> None:
    with timer.stage("reconstruct") as stage, _kept(pair, stage):
        data = _few(pair, timer, stage)

        def tick(fit: LayerFit, done: int, total: int) -> None:
            stage.tick(done, total)

        fitted = reconstruct(pair.small, pair.dense, data, pair.plan, loss=pair.run, ridge="auto", on_fit=tick)
        skipped = [fit for fit in fitted.fits if fit.skipped]
        stage.note(f"{len(fitted.fits) - len(skipped)} layers")
        if skipped:
            stage.note(f"{len(skipped)} layers not refitted, as {skipped[0].name}: {skipped[0].skipped}")


def _few(pair: Pair, timer: StageTimer, stage: Running) -> list[Any]:
    """The batches of the fit that the budget has time for; one batch alone in four parts, to choose the ridge by."""
    batches = list(pair.data.fit)
    if len(batches) == 1 and size(batches[0]) >= 4:
        count = size(batches[0])
        batches = [part(batches[0], k * count // 4, (k + 1) * count // 4) for k in range(4)]
    if math.isinf(timer.left):
        return batches
    start = now()
    with mode(pair.dense, training=False), torch.no_grad():
        pair.run(pair.dense, batches[0])
    most = max(1, int(0.7 * timer.left / max(8 * since(start), 1e-6)))
    if most < len(batches):
        stage.note(f"{most} of {len(batches)} batches: budget")
    return batches[:most]


def _distilled(pair: Pair, how: Recover, timer: StageTimer) -> None:
    steps, why = _steps(pair, how, timer)
    if not steps:
        timer.skip("distill", why)
        return
    with timer.stage("distill") as stage, _kept(pair, stage) as kept:

        def look(step: int, loss: float, lr: float) -> None:
            stage.tick(step + 1, steps)
            if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
                kept.look()

        training = Training(optimizer=_sgd, lr_schedule=_cosine, seed=pair.seed)
        loss = _imitation(pair)
        try:
            finetune(pair.small, list(pair.data.fit), loss, steps=steps, lr=how.lr, training=training, on_step=look)
        finally:
            stage.note(f"{steps} steps, {why}" if why else f"{steps} steps")


def _steps(pair: Pair, how: Recover, timer: StageTimer) -> tuple[int, str]:
    """The number of steps, and why so few or none."""
    if how.steps is not None:
        return how.steps, "" if how.steps else "recover= does not ask for it"
    if not any(parameter.requires_grad for parameter in pair.small.parameters()):
        return 0, "no parameter requires a gradient"
    steps = min(STEPS, 4 * len(pair.data.fit))
    if math.isinf(timer.left):
        return steps, ""
    start = now()
    with mode(pair.dense, training=False), torch.no_grad():
        pair.run(pair.dense, pair.data.fit[0])
    most = int(0.8 * timer.left / max(5 * since(start), 1e-6))
    if most < 4:
        return 0, "the budget has no time for it"
    return min(most, steps), "as the budget allows" if most < steps else ""


def _imitation(pair: Pair) -> Loss:
    """KL at temperature 2 for logits, else one minus the cosine. Norms of large batches train; dropout does not."""
    logits = distance_of(pair.expected[0]) is divergence

    def outputs(model: nn.Module, batch: Any) -> Any:
        output = pair.run(model, batch)
        return getattr(output, "logits", output)

    by_logits = distill_logits(pair.dense, temperature=2.0, outputs=outputs)
    norms = [module for module in pair.small.modules() if isinstance(module, _BatchNorm)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        model.eval()
        for norm in norms:
            norm.train(size(batch) >= TRAINED_NORMS)
        if logits:
            return by_logits(model, batch)
        with mode(pair.dense, training=False), torch.no_grad():
            expected = first_tensor(pair.run(pair.dense, batch)).flatten(1)
        return (1 - F.cosine_similarity(first_tensor(pair.run(model, batch)).flatten(1), expected)).mean()

    return loss


def _sgd(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr, momentum=0.9, nesterov=True)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# -- never worse ---------------------------------------------------------------------------------------------------


class _Best:
    """The best state of a model so far."""

    def __init__(self, pair: Pair, start: float) -> None:
        self._measure: Callable[[], float] = pair.distance
        self._live = [*pair.small.parameters(), *pair.small.buffers()]
        self._copy = [tensor.detach().clone() for tensor in self._live]
        self.distance = start

    def look(self, slack: float = 0.0) -> float:
        """Keep the present state if it is better."""
        distance = self._measure()
        if distance < self.distance or distance <= self.distance * (1 + slack):
            self._copy = [tensor.detach().clone() for tensor in self._live]
            self.distance = distance
        return distance

    def restore(self) -> None:
        """The best state."""
        with torch.no_grad():
            for tensor, value in zip(self._live, self._copy, strict=True):
                tensor.copy_(value)


@contextmanager
def _kept(pair: Pair, stage: Running, slack: float = 0.0) -> Iterator[_Best]:
    """One stage: the model keeps its best state, which may be the one before. slack: what rounding alone may add."""
    before = pair.distance()
    best = _Best(pair, before)
    try:
        yield best
    except CheckFailed as error:
        stage.note(f"undone: {error.what}")
    else:
        last = best.look(slack)
        if best.distance == before and last > before * (1 + slack):
            stage.note(f"undone: the distance would be {last:.4g}")
        elif last > best.distance:
            stage.note("the best state on held-out data is kept, not the last")
    best.restore()
    stage.compared(before, best.distance, pair.measure)
