"""The whole job: plan, cut, heal, check, measure, and write the artefact and the report.

Nothing is written before every gate has been passed, and what is written is either there and complete or not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from prunella.errors import CheckFailed, RequestError
from prunella.io.artifact import Saved, save
from prunella.io.files import check_free
from prunella.io.json import plain, write_json
from prunella.io.lock import locked
from prunella.measure.clock import now, since
from prunella.model.copying import copied
from prunella.model.forward import Outputs, forward
from prunella.model.state import mode
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.recovery.batchnorm import recalibrate_bn
from prunella.recovery.distill import distill, distill_logits
from prunella.recovery.finetune import Curve, Training, finetune
from prunella.recovery.reconstruct import reconstruct
from prunella.reporting.page import write_page
from prunella.reporting.report import Curve as Recovery
from prunella.reporting.report import Report, report
from prunella.targets import Target
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink
from prunella.types import Inputs, Loss

PAGE, RECORD = "report.html", "run.json"

HealKind = Literal["bn", "reconstruct", "distill", "finetune"]
_KINDS: dict[str, HealKind] = {kind: kind for kind in get_args(HealKind)}
Metric = Callable[[nn.Module], float]
"""Quality of a model; higher is better."""
OnStage = Callable[[str, float], None]
"""Called with the name of a stage when it is done, and its seconds."""


@dataclass(frozen=True)
class Heal:
    """One way to heal: `bn`, `reconstruct`, `distill:200`, `finetune:500`; the number is of steps."""

    kind: HealKind
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.steps}" if self.steps else self.kind


def read_heal(text: str) -> tuple[Heal, ...]:
    """Read `bn,reconstruct,distill:200`."""
    return tuple(_read_heal(part.strip()) for part in text.split(",") if part.strip())


def _read_heal(text: str) -> Heal:
    kind, _, number = text.partition(":")
    trained = kind in ("distill", "finetune")
    if (
        kind not in get_args(HealKind)
        or bool(number) != trained
        or (trained and not (number.isdigit() and int(number)))
    ):
        why = "a step is bn, reconstruct, distill:STEPS or finetune:STEPS"
        raise RequestError(f"cannot read the healing {text!r}", why, "for example --heal bn,reconstruct,distill:200")
    return Heal(_KINDS[kind], int(number or 0))


@dataclass(frozen=True)
class Job:
    """What to do. `metric` and `max_drop` are a gate: the quality may fall by so much and no more.

    factory: how the dense model is made, for `load`; source: the Hugging Face folder that it came from. command: how to
    do this again, for the report.
    """

    recipe: Recipe
    target: Target | None
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    heal: tuple[Heal, ...] = ()
    lr: float = 1e-4
    metric: Metric | None = None
    max_drop: float | None = None
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    factory: str | None = None
    source: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Healed:
    """The result of one way to heal."""

    step: Heal
    text: str
    curve: Curve | None = None


@dataclass(frozen=True)
class Outcome:
    """What `run` made. `before`, `cut` and `after`: quality of the dense, the cut and the healed model."""

    plan: Plan
    model: nn.Module
    saved: Saved
    report: Report
    healed: tuple[Healed, ...]
    before: float | None
    cut: float | None
    after: float | None
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    model: nn.Module,
    inputs: Inputs,
    job: Job,
    folder: Path,
    *,
    overwrite: bool = False,
    on_stage: OnStage | None = None,
) -> Outcome:
    """Do the job and write `folder`: the artefact, `report.html` and `run.json`. `model` stays as it is.

    Raises RequestError before anything is done when the folder is taken or an option needs another, Locked while
    another run writes it; TargetMissed and CheckFailed when a target or a gate is missed, and then writes nothing.
    """
    _check(job)
    check_free(folder, overwrite=overwrite)
    with locked(folder):
        return _run(model, inputs, job, folder, overwrite, _Clock(on_stage))


def _run(model: nn.Module, inputs: Inputs, job: Job, folder: Path, overwrite: bool, clock: _Clock) -> Outcome:
    with clock.stage("planning"):
        made = _plan(model, inputs, job)
    with clock.stage("cutting and comparing with the masked model"):
        small = shrink(model, made) if made.changes else apply_(copied(model), made)
    before, cut = _quality(model, job, clock, "dense"), _quality(small, job, clock, "pruned")
    healed = tuple(_heal(step, small, model, made, job, clock) for step in job.heal)
    after = _quality(small, job, clock, "healed") if healed else cut
    _check_drop(before, after, job.max_drop)
    with clock.stage("measuring both models"):
        compared = report(
            model,
            small,
            inputs,
            plan=made,
            quality=_scores(before, after),
            curve=_curve(healed),
            command=job.command,
            rounds=_rounds(model, inputs),
        )
    with clock.stage("saving"):
        saved = save(small, folder, plan=made, factory=job.factory, source=job.source, dense=model, overwrite=overwrite)
        outcome = Outcome(made, small, saved, compared, healed, before, cut, after, clock.seconds)
        write_page(compared, folder / PAGE)
        write_json(folder / RECORD, plain(summary(outcome, job)))
    return outcome


def _rounds(model: nn.Module, inputs: Inputs, *, seconds: float = 20.0) -> int:
    """As many rounds of both models as fit into the time: 10 at least, 40 at most."""
    with mode(model, training=False), torch.no_grad():
        forward(model, inputs)
        start = now()
        forward(model, inputs)
    return min(40, max(10, int(seconds / (2 * (since(start))))))


def _scores(before: float | None, after: float | None) -> tuple[tuple[str, float, float], ...]:
    return () if before is None or after is None else (("quality", before, after),)


def _curve(healed: Sequence[Healed]) -> Recovery | None:
    """The curve of the last way to heal that trains."""
    trained = [item for item in healed if item.curve is not None]
    if not trained or trained[-1].curve is None:
        return None
    points = tuple((float(step), value) for step, value in enumerate(trained[-1].curve.loss))
    return Recovery(points, name=f"loss ({trained[-1].step})")


def _check(job: Job) -> None:
    if job.heal and job.data is None:
        raise RequestError(f"cannot heal by {job.heal[0]}", "there is no data", "give --data module:function")
    if job.loss is None and any(step.kind == "finetune" for step in job.heal):
        raise RequestError(
            "cannot fine-tune", "there is no loss", "give --loss module:function, or heal by distill:STEPS"
        )
    if job.max_drop is not None and job.metric is None:
        raise RequestError("cannot check --max-drop", "there is no measure of quality", "give --metric module:function")


def _plan(model: nn.Module, inputs: Inputs, job: Job) -> Plan:
    return plan(
        model,
        inputs,
        job.recipe,
        target=job.target,
        data=job.data,
        loss=job.loss,
        skip=list(job.skip),
        only=list(job.only),
    )


class _Clock:
    """Seconds of each stage, told when it is done."""

    def __init__(self, on_stage: OnStage | None) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = on_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = now()
        yield
        self.seconds[name] = since(start)
        if self._tell:
            self._tell(name, self.seconds[name])


def _quality(model: nn.Module, job: Job, clock: _Clock, name: str) -> float | None:
    if job.metric is None:
        return None
    with clock.stage(f"measuring the quality of the {name} model"):
        return float(job.metric(model))


def _check_drop(before: float | None, after: float | None, limit: float | None) -> None:
    if limit is None or before is None or after is None or before - after <= limit:
        return
    why = f"it fell from {before:.4g} to {after:.4g}, by {before - after:.4g}; --max-drop allows {limit:.4g}"
    raise CheckFailed("the quality fell too far; nothing was written", why, "heal longer, or keep more (--target)")


def _heal(step: Heal, small: nn.Module, dense: nn.Module, made: Plan, job: Job, clock: _Clock) -> Healed:
    data = job.data
    assert data is not None, "checked at the start"
    training = Training(seed=job.recipe.seed)
    with clock.stage(f"healing by {step}"):
        if step.kind == "bn":
            return Healed(step, f"{len(recalibrate_bn(small, data, loss=job.loss))} batch normalisations")
        if step.kind == "reconstruct":
            return Healed(step, str(reconstruct(small, dense, data, made, loss=job.loss)))
        if step.kind == "distill":
            imitate = partial(distill_logits, outputs=outputs_by(job.loss) if job.loss else forward)
            curve = distill(small, dense, data, steps=step.steps, lr=job.lr, imitate=imitate, training=training)
        else:
            assert job.loss is not None, "checked at the start"
            curve = finetune(small, data, job.loss, steps=step.steps, lr=job.lr, training=training)
    return Healed(step, str(curve), curve)


def outputs_by(loss: Loss) -> Outputs:
    """What the model returns for a batch, where `loss(model, batch)` is all that says how to run it."""

    def outputs(model: nn.Module, batch: Any) -> Any:
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, arguments, output: seen.append(output))
        try:
            loss(model, batch)
        finally:
            handle.remove()
        if not seen:
            raise RequestError("the loss does not call the model", "model(...) was not called", "call it in the loss")
        return seen[-1]

    return outputs


def summary(outcome: Outcome, job: Job) -> dict[str, Any]:
    """The outcome as plain data, for `run.json` and `--json`."""
    before, after = outcome.plan.before, outcome.plan.after
    target = job.target or outcome.plan.target
    healed = [{"by": str(item.step), "result": item.text} for item in outcome.healed]
    said = [f"healed by {item['by']}: {item['result'].splitlines()[-1]}" for item in healed]
    return {
        "text": "\n".join([str(outcome.report), *said]),
        "folder": str(outcome.saved.path),
        "target": str(target) if target else None,
        "params": [before.params, after.params],
        "macs": [before.macs, after.macs],
        "bytes": [before.bytes, after.bytes],
        "weights": [before.weights, after.weights],
        "quality": [outcome.before, outcome.cut, outcome.after],
        "healed": healed,
        "reader": outcome.saved.reader,
        "seconds": outcome.seconds,
        "seed": job.recipe.seed,
        "report": plain(outcome.report.data()),
    }
