"""The full job: plan, cut, recover, check, measure, and write the artifact and the report.

The output is written after every gate has passed, and appears atomically: artifact, report and record at once.
A killed run resumes from its last finished stage, or from the last checkpoint of a training; see `stages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.app.job import Job, Quality, RecoveryStep, StepKind
from prunella.app.prune import asked_of, recover_all_
from prunella.app.prune_plan import Asked
from prunella.app.prune_plan import planned as planned_by
from prunella.app.prune_recover import Recover
from prunella.app.prune_stages import StageTimer
from prunella.app.record import FORMAT, RECORD
from prunella.app.recover import Recovered, Tick, outputs_by, recover_
from prunella.app.stages import Stages, open_stages
from prunella.errors import BadInput, CheckFailed, RequestError
from prunella.graph.verify import relative_error
from prunella.io.artifact import Saved, drafted
from prunella.io.identity import weights_digest
from prunella.io.json import plain, write_json
from prunella.io.lock import locked
from prunella.io.space import check_apart, check_output_folder, check_space
from prunella.io.tensor_writer import size_of
from prunella.measure.clock import now, since
from prunella.model.copying import copied
from prunella.model.forward import first_tensor, forward, inputs_of
from prunella.model.rng import restore_rng_, rng_state
from prunella.model.state import mode, untouched
from prunella.model.trees import tensors
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.recovery.checkpoint import named_tensors
from prunella.reporting.extra import reason_without
from prunella.reporting.page import write_page
from prunella.reporting.report import Curve, Report, report
from prunella.transform.apply import apply_
from prunella.transform.shrink import shrink
from prunella.types import Inputs

PAGE = "report.html"
NOT_RECOVERED = "NOT RECOVERED, the cut alone: --data recovers it, and --metric shows its quality"
Stage = Callable[[str, int], AbstractContextManager[Tick]]
"""Shows a stage while it runs: (name, number of parts) -> context that gives what to call after each part."""


@dataclass(frozen=True)
class Outcome:
    """The result of `run`. `before`, `cut` and `after`: quality of the dense, the cut and the recovered model.

    outputs: the first outputs for the example, to check a stored copy. missing: why there is no `report.html`; empty if
    there is one.
    """

    plan: Plan
    model: nn.Module
    saved: Saved
    report: Report
    recovered: tuple[Recovered, ...]
    before: Quality
    cut: Quality
    after: Quality
    outputs: tuple[float, ...]
    missing: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def unseen(name: str, parts: int) -> AbstractContextManager[Tick]:
    """A stage without display."""
    return nullcontext(lambda *_: None)


def run(
    model: nn.Module,
    inputs: Inputs,
    job: Job,
    folder: Path,
    *,
    overwrite: bool = False,
    stage: Stage = unseen,
) -> Outcome:
    """Do the job and write `folder`: the artifact, `report.html` and `run.json`. `model` does not change.

    stage: displays the current stage. Errors: RequestError, before any work, if the folder exists or a part of the job
    is missing; Locked while another run writes the folder; TargetMissed and CheckFailed if a target or a gate is
    missed. Nothing is written after an error.
    """
    job.check()
    check_apart(folder, job.source)
    with locked(folder), open_stages(folder, model, inputs, job, overwrite=overwrite) as stages:
        check_output_folder(folder, overwrite=overwrite)
        return _run(model, inputs, job, folder, overwrite, _Clock(stage), stages)


def _run(
    model: nn.Module, inputs: Inputs, job: Job, folder: Path, overwrite: bool, clock: _Clock, stages: Stages
) -> Outcome:
    before = _quality(model, job, clock, "dense", stages)  # first, so that a broken metric fails before the long work
    with clock.stage("planning"):
        planned = stages.plan(partial(_plan, model, inputs, job, stages), inputs)
    with clock.stage("cutting and comparing with the masked model"):
        small = shrink(model, planned) if planned.changes else apply_(copied(model), planned)
    check_space(folder, size_of(named_tensors(small)))
    cut = _quality(small, job, clock, "cut", stages)
    recovered = _recover(small, model, planned, job, clock, stages)
    after = _quality(small, job, clock, "recovered", stages) if recovered else cut
    _check_names(before, after)
    _check_drop(before, after, job.max_drop)
    with clock.stage("measuring both models"):
        scores = tuple((name, before[name], after[name]) for name in before)
        compared = report(
            model, small, inputs, plan=planned, quality=scores, curve=_curve(recovered), command=job.command,
            rounds=_rounds(model, inputs),
        ).with_cut(cut if recovered else {})  # fmt: skip
        if job.data is not None:
            difference = _apart(model, small, job, job.data)
            compared = replace(compared, difference=difference, compared_on="the first batch of the data")
        if planned.changes and not recovered:
            compared = replace(compared, caveats=(NOT_RECOVERED, *compared.caveats))
        outputs = _outputs(small, inputs)
    with clock.stage("saving"), drafted(
        small, folder, plan=planned, factory=job.factory, source=job.source, dense=model, overwrite=overwrite
    ) as draft:  # fmt: skip
        missing = reason_without(partial(write_page, compared, draft.folder / PAGE), PAGE)
        outcome = Outcome(
            planned, small, draft.saved, compared, recovered, before, cut, after, outputs, missing, clock.seconds
        )
        record = {**summary(outcome, job), "folder": folder.name, "dense": weights_digest(model)}
        stages.finish(write_json(draft.folder / RECORD, plain(record)))
    return replace(outcome, saved=draft.saved)


def _plan(model: nn.Module, inputs: Inputs, job: Job, stages: Stages) -> Plan:
    if job.auto:
        return planned_by(_asked(model, inputs, job), StageTimer(), stages.records)
    return plan(
        model, inputs, job.recipe, target=job.target, data=job.data, loss=job.loss,
        skip=list(job.skip), only=list(job.only), remove=job.by_hand.remove, keep=job.by_hand.keep,
        ratios=job.by_hand.ratios, counts=job.by_hand.counts,
    )  # fmt: skip


def _apart(model: nn.Module, small: nn.Module, job: Job, data: Iterable[Any]) -> float:
    """The largest difference of outputs on the first batch of the data, which is more meaningful than noise."""
    random = rng_state(data)
    batch = next(iter(data))  # the plan or the recovery has read it
    restore_rng_(random, data)
    give = outputs_by(job.loss) if job.loss else forward
    batch = batch if job.loss else inputs_of(model, batch)
    outputs = []
    for one in (model, small):
        with untouched(one, job.recipe.seed), torch.no_grad():
            outputs.append([tensor.cpu() for tensor in tensors(give(one, batch))])
    return relative_error(*outputs)


def _rounds(model: nn.Module, inputs: Inputs, *, seconds: float = 20.0) -> int:
    """The number of rounds of both models that fit into the time: between 10 and 40."""
    with mode(model, training=False), torch.no_grad():
        forward(model, inputs)
        start = now()
        forward(model, inputs)
    return min(40, max(10, int(seconds / (2 * (since(start))))))


def _curve(recovered: Sequence[Recovered]) -> Curve | None:
    """The losses of the last training step of recovery."""
    trained = [(item.step, item.curve) for item in recovered if item.curve is not None]
    if not trained:
        return None
    step, curve = trained[-1]
    return Curve(tuple((float(number), value) for number, value in enumerate(curve.loss)), name=f"loss ({step})")


def _outputs(model: nn.Module, inputs: Inputs) -> tuple[float, ...]:
    with mode(model, training=False), torch.inference_mode():
        return tuple(first_tensor(forward(model, inputs)).flatten()[:8].tolist())


class _Clock:
    """Displays the stages, and stores the seconds of those that succeeded."""

    def __init__(self, show: Stage) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show

    @contextmanager
    def stage(self, name: str, parts: int = 1) -> Iterator[Tick]:
        start = now()
        with self._show(name, parts) as tick:
            yield tick
        self.seconds[name] = self.seconds.get(name, 0.0) + since(start)


def _quality(model: nn.Module, job: Job, clock: _Clock, name: str, stages: Stages) -> Quality:
    if job.metric is None:
        return {}
    with clock.stage(f"evaluating the {name} model"):
        quality = stages.quality(name, partial(_evaluated, model, job, name))
    for key, value in quality.items():
        # NaN of a pruned model counts as a drop. Infinity would pass every gate.
        if value == math.inf or (name == "dense" and not math.isfinite(value)):
            why = f"{key} of the {name} model is {'NaN' if math.isnan(value) else value}"
            raise BadInput("the metric is not finite", why, "return a number for every model; higher is better")
    return quality


def _evaluated(model: nn.Module, job: Job, name: str) -> Quality:
    """The quality. Changes of the dense model or of random states by the metric are undone, since planning follows."""
    if name != "dense":
        return job.quality(model)
    random = rng_state(job.data)
    with untouched(model):
        quality = job.quality(model)
    restore_rng_(random, job.data)
    return quality


def _recover(
    small: nn.Module, dense: nn.Module, planned: Plan, job: Job, clock: _Clock, stages: Stages
) -> tuple[Recovered, ...]:
    if job.auto:
        return _recover_auto(small, _asked(dense, planned.inputs, job), planned, clock, stages)
    recovered = []
    for number, step in enumerate(job.recovery.steps, 1):
        parts = len(planned.rows) if step.kind == "reconstruct" else step.steps or 1
        with clock.stage(f"recovering by {step}", parts) as tick:
            do = partial(recover_, small, dense, planned, job, step, tick, stages.checkpoint(number))
            told = stages.recover(number, small, lambda do=do: do().plain())  # type: ignore[misc]
            recovered.append(Recovered.read(step, told))
    return tuple(recovered)


def _asked(model: nn.Module, inputs: Inputs | None, job: Job) -> Asked:
    """Errors: RequestError without a target."""
    if job.target is None or inputs is None:
        raise RequestError("target= is missing", "a budget needs its unit", "for example target=MACs(0.5)")
    return asked_of(
        model, inputs, target=job.target, data=job.data, loss=job.loss, skip=job.skip, only=job.only,
        seed=job.recipe.seed,
    )  # fmt: skip


def _recover_auto(
    small: nn.Module, asked: Asked, planned: Plan, clock: _Clock, stages: Stages
) -> tuple[Recovered, ...]:
    """The stages of `prune`, each as a step."""
    kinds: dict[str, StepKind] = {"reconstruct": "reconstruct", "bn": "bn", "distill": "distill"}
    if asked.data is None:
        return ()
    timer = StageTimer()
    with clock.stage("recovering"):
        recover_all_(asked, small, planned, Recover(), timer, stages)
    told = {stage.name: stage.told for stage in timer.history if stage.after is not None}
    return tuple(Recovered(RecoveryStep(kind), told[name]) for name, kind in kinds.items() if name in told)


def _check_names(before: Quality, after: Quality) -> None:
    """Errors: RequestError if a metric names other numbers for the pruned model."""
    if before.keys() != after.keys():
        why = f"{', '.join(before)} of the dense model, {', '.join(after)} of the pruned one"
        raise RequestError("metric= must name the same numbers for every model", why, "return all of them each time")


def _check_drop(before: Quality, after: Quality, limit: float | None) -> None:
    """The gate: the first metric may fall by the limit at most."""
    if limit is None or not before:
        return
    name, dense = next(iter(before.items()))
    if not dense - after[name] <= limit:  # the negation also refuses NaN
        why = (
            f"it fell from {dense:.4g} to {after[name]:.4g}, by {dense - after[name]:.4g}; max_drop= allows {limit:.4g}"
        )
        raise CheckFailed(f"{name} fell too far; nothing was written", why, "recover longer, or prune less (target=)")


def _in_short(result: str) -> str:
    """The result of a step of recovery in one line; the full text may have a line per layer."""
    lines = result.splitlines()
    return f"{len(lines)} layers, the last one {lines[-1]}" if len(lines) > 1 else result


def summary(outcome: Outcome, job: Job) -> dict[str, Any]:
    """The outcome as plain data, for `run.json` and `--json`."""
    before, after, target = outcome.plan.before, outcome.plan.after, job.target or outcome.plan.target
    recovered = [{"by": str(item.step), "result": item.text} for item in outcome.recovered]
    lines = [f"recovered by {item['by']}: {_in_short(item['result'])}" for item in recovered]
    return {
        "format": FORMAT,
        "text": "\n".join([*([job.about, ""] if job.about else []), str(outcome.report), *lines]),
        "about": job.about,
        "folder": str(outcome.saved.path),
        "target": str(target) if target else None,
        "params": [before.params, after.params],
        "macs": [before.macs, after.macs],
        "bytes": [before.bytes, after.bytes],
        "weights": [before.weights, after.weights],
        "quality": [dict(outcome.before), dict(outcome.cut), dict(outcome.after)],
        "recovered": recovered,
        "outputs": list(outcome.outputs),
        "reader": outcome.saved.reader,
        "missing": outcome.missing,
        "seconds": outcome.seconds,
        "seed": job.recipe.seed,
        "report": plain(outcome.report.data()),
    }
