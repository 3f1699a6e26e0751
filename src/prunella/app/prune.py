"""`prune`: plan, cut and recover in one call, by the methods with the best measured results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from prunella.app.prune_data import split
from prunella.app.prune_plan import Asked, planned
from prunella.app.prune_recover import Pair, Recover, recover_
from prunella.app.prune_stages import OnStage, Stage, StageTimer, seconds_of
from prunella.app.recover import outputs_by
from prunella.app.stages import Stages, open_kept_stages
from prunella.errors import RequestError
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.journal import NAME
from prunella.io.lock import locked
from prunella.model.batches import data_errors
from prunella.model.forward import Outputs, forward
from prunella.model.state import outside_inference
from prunella.model.unwrap import unwrap
from prunella.planning import accounting
from prunella.planning.checks import check_finite, check_seed
from prunella.planning.plan import Plan
from prunella.reporting.report import Report, report
from prunella.targets import Latency, Sparsity, Target
from prunella.transform.shrink import shrink
from prunella.types import Inputs, Loss

_WORDS: dict[str, Recover] = {
    "auto": Recover(),
    "reconstruct": Recover(steps=0),
    "none": Recover(reconstruct=False, steps=0),
}


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`. model: the smaller model; the given model is unchanged. plan: the pruned units.

    history: the stages, with the distance to the dense outputs on held-out batches. report: sizes, times and outputs
    next to those of the dense model, measured on first access.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> pruned: pr.Pruned = pr.prune(model, torch.randn(2, 8), target=pr.MACs(0.5))
        >>> print(str(pruned).splitlines()[0])
        NOT RECOVERED, not usable yet: pass data=... (batches of inputs, no labels). macs=0.5 (asked 0.5)
    """

    model: nn.Module
    plan: Plan
    history: tuple[Stage, ...]
    targets: tuple[Target, ...]
    dense: nn.Module = field(repr=False)

    @cached_property
    def report(self) -> Report:
        """Both models side by side. It times them, which takes some seconds."""
        assert self.plan.inputs is not None, "`prune` was given them"
        return report(self.dense, self.model, self.plan.inputs, plan=self.plan, rounds=10)

    @property
    def distance(self) -> float | None:
        """Distance to the dense outputs on held-out batches; None without data."""
        return next((stage.after for stage in reversed(self.history) if stage.after is not None), None)

    def __str__(self) -> str:
        return "\n".join([self._first, *(f"  {stage}" for stage in self.history)])

    @property
    def _first(self) -> str:
        reached = ", ".join(_reached(self.plan, target) for target in self.targets)
        cut = next((stage for stage in self.history if stage.name == "compare"), None)
        if cut is None:
            return f"NOT RECOVERED, not usable yet: pass data=... (batches of inputs, no labels). {reached}"
        if not any(stage.name in ("reconstruct", "distill") and stage.after is not None for stage in self.history):
            why = "recover= or the budget left it out"
            distances = f"{cut.measure} from the dense outputs: {cut.after:.4g}"
            return f"NOT RECOVERED, not usable yet: {why}. {reached}; {distances}"
        distances = f"{cut.after:.4g} cut, {self.distance:.4g} recovered"
        return f"{reached}; {cut.measure} from the dense outputs on held-out data: {distances}"


def prune(
    model: nn.Module,
    inputs: Inputs,
    *,
    target: Target | Sequence[Target],
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    recover: Literal["auto", "reconstruct", "none"] | Mapping[str, Any] | Recover = "auto",
    budget: float | str | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    seed: int = 0,
    on_stage: OnStage | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Pruned:
    """Plan, cut and recover: a smaller model that meets every target. `model` does not change.

    With data, a quarter of the batches is held out. Units are ranked by elimination with weight updates (`obs_units`).
    The number pruned from each group follows from the measured losses of real cuts (`pr.search.measured`). If the
    targets allow it, widths are multiples of 8 (of 4 below 32 channels), and residual streams are kept dense. Then
    `reconstruct` refits the layers, `absorb_bn` updates the statistics, and a short distillation follows. A stage that
    increases the distance on the held-out batches is undone. Without data, units are ranked by `group_norm`, no group
    is emptied, and nothing is recovered.

    target: one or several, such as `[MACs(0.5), Params(0.6)]`: all are met. data: batches without labels; if a batch
    has labels and the model takes one argument, its first entry is used. A few hundred images or a few thousand tokens
    suffice. loss: runs the model on a batch, if the model cannot be called on the batch itself. recover: "auto",
    "reconstruct" (no training), "none", or settings such as `{"steps": 200, "lr": 0.01}`. budget: time for planning and
    recovery, such as `"2min"` or a number of seconds. A small budget means fewer levels and batches, then scores
    without measured losses, then no distillation; the plan and its proof are always made, however long they take.
    skip, only: as in `plan`. on_stage: called with the `Progress` of each stage, which estimates the time left.
    folder: stores the work as it is done: measured losses, the plan, the model after each step of recovery, and a
    checkpoint of training every minute. After a kill the same call resumes from there with bit-identical results; a
    call with changed arguments is refused. Remove the folder when the job is done.

    Errors: those of `plan`; TargetMissed names the binding constraint. With a folder: Locked while another process
    writes it; RequestError if the folder belongs to another call, with the differences.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
        >>> data = [torch.randn(64, 8) for _ in range(8)]
        >>> pruned = pr.prune(model, data[0], target=pr.MACs(0.5), data=data)
        >>> pruned.plan.got, [stage.name for stage in pruned.history][:3]
        (0.5, ['groups', 'statistics', 'measured losses'])
        >>> pruned.model[0].out_features
        32
    """
    how, timer = _recover(recover), StageTimer(seconds_of(budget), on_stage)
    place = _place(folder)
    with outside_inference(), nullcontext() if place is None else locked(place / NAME):
        asked = asked_of(model, inputs, target=target, data=data, loss=loss, skip=skip, only=only, seed=seed)
        asked = replace(asked, refits=how.reconstruct)
        with open_kept_stages(place, lambda: _identity(asked, loss, how, timer.budget)) as stages:
            plan = stages.plan(partial(planned, asked, timer, stages.records), inputs, timer)
            with timer.stage("cut"):
                small = shrink(asked.model, plan)
            recover_all_(asked, small, plan, how, timer, stages)
    return Pruned(small, plan, tuple(timer.history), asked.targets, asked.model)


def _place(folder: str | os.PathLike[str] | None) -> Path | None:
    """Errors: RequestError for an empty name, which would be the current directory."""
    if folder is not None and not os.fspath(folder):
        raise RequestError('folder="" is not a folder', "the work would lie in the current directory", "give it a name")
    return None if folder is None else Path(folder)


def _identity(asked: Asked, loss: Loss | None, how: Recover, budget: float | None) -> Identity:
    """Everything that determines the result of `prune`, each part by its name."""
    data = asked.data and asked.data.parts
    parts: dict[str, object] = {"inputs": asked.inputs, "target": asked.targets, "data": data, "loss": loss}
    parts |= {"recover": repr(how), "budget": str(budget), "seed": asked.seed}
    parts |= {"skip": list(asked.skip), "only": list(asked.only)}
    return identify({**model_parts(asked.model), **parts})


def asked_of(
    model: nn.Module,
    inputs: Inputs,
    *,
    target: Target | Sequence[Target],
    data: Iterable[Any] | None,
    loss: Loss | None,
    skip: Sequence[str],
    only: Sequence[str],
    seed: int,
) -> Asked:
    """The checked arguments. Errors: RequestError, BadInput."""
    check_seed(seed)
    targets, model = _targets(target), unwrap(model)
    check_finite(model)
    batches = None if data is None else split(model, data, loss, inputs)
    return Asked(model, inputs, targets, batches, _run(loss), tuple(skip), tuple(only), seed)


def _run(loss: Loss | None) -> Outputs:
    """The function that runs the model on a batch, or on a part of one."""
    outputs: Outputs = forward if loss is None else outputs_by(loss)

    def run(model: nn.Module, batch: Any) -> Any:
        with data_errors(model, batch, name="a batch of data="):
            return outputs(model, batch)

    return run


def recover_all_(asked: Asked, small: nn.Module, plan: Plan, how: Recover, timer: StageTimer, stages: Stages) -> None:
    """Run the recovery after the cut, in place."""
    if asked.data is None:
        timer.skip("recovery", "there is no data; pass data=...")
        return
    pair = Pair(asked.model, small, plan, asked.data, asked.run, asked.seed)
    with timer.stage("compare") as stage:
        distance = pair.distance()
        pair.remember(distance)
        stage.compared(None, distance, pair.measure)
        stage.note(asked.data.note)
    recover_(pair, how, timer, stages)


def _targets(target: Target | Sequence[Target]) -> tuple[Target, ...]:
    """The targets as a tuple. Errors: RequestError if there is none, or one has another type."""
    targets = tuple(target) if isinstance(target, list | tuple) else (target,)
    if not targets or not all(isinstance(entry, Target) for entry in targets):
        raise RequestError(
            f"target={target!r} is not a budget", "a budget needs its unit", "for example target=MACs(0.5), or a list"
        )
    if sum(isinstance(entry, Latency) for entry in targets) > 1:
        raise RequestError("two latency targets are given", "the smaller one decides", "give one Latency")
    return targets


def _recover(recover: str | Mapping[str, Any] | Recover) -> Recover:
    """The recovery settings. Errors: RequestError for an unknown word or setting."""
    if isinstance(recover, Recover):
        how = recover
    elif isinstance(recover, str):
        if recover not in _WORDS:
            raise RequestError(f"recover={recover!r} is unknown", f"it takes {', '.join(_WORDS)}", "or settings")
        how = _WORDS[recover]
    else:
        names = {entry.name for entry in fields(Recover)}
        if not set(recover) <= names:
            wrong = ", ".join(sorted(map(str, set(recover) - names)))
            raise RequestError(f"recover= has no setting {wrong}", f"it takes {', '.join(sorted(names))}")
        how = replace(Recover(), **recover)
    if (how.steps is not None and how.steps < 0) or (how.lr is not None and not how.lr > 0):
        raise RequestError(f"cannot train {how.steps} steps at lr={how.lr}", "both must be positive")
    return how


def _reached(plan: Plan, target: Target) -> str:
    """`macs=0.4996 (asked 0.5)`."""
    if isinstance(target, Sparsity):
        return f"sparsity={accounting.sparsity(plan.rows):.4g} (asked {target.value:g})"
    before, after = getattr(plan.before, target.name), getattr(plan.after, target.name)
    value = after / before if target.value <= 1 else after
    return f"{target.name}={value:.4g} (asked {target.value:g})"
