"""A job for `run`: the pruning request, the recovery, and the checks to pass before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from prunella.errors import RequestError, near_names
from prunella.model.user_code import number_of
from prunella.planning.by_hand import ByHand
from prunella.planning.recipe import Recipe
from prunella.targets import Target
from prunella.types import Loss

StepKind = Literal["bn", "reconstruct", "distill", "finetune"]
_KINDS: dict[str, StepKind] = {kind: kind for kind in get_args(StepKind)}
Quality = Mapping[str, float]
"""Name of a metric -> its value; higher is better. Empty if nothing is evaluated."""
Metric = Callable[[nn.Module], float | Quality]
"""Quality of a model: one number, or several by name. `max_drop` limits the first one."""


@dataclass(frozen=True)
class RecoveryStep:
    """One step of recovery: `bn`, `reconstruct`, `distill:200`, `finetune:500`; the number is of optimizer steps."""

    kind: StepKind
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.steps}" if self.steps else self.kind


def read_steps(text: str) -> tuple[RecoveryStep, ...]:
    """Read `bn,reconstruct,distill:200`."""
    return tuple(_read_step(part.strip()) for part in text.split(",") if part.strip())


def _read_step(text: str) -> RecoveryStep:
    kind, _, number = text.partition(":")
    trained = kind in ("distill", "finetune")
    if kind not in _KINDS or bool(number) != trained or (trained and not (number.isdigit() and int(number))):
        why = "a step is bn, reconstruct, distill:STEPS or finetune:STEPS"
        near = "" if kind in _KINDS else near_names(kind, _KINDS)
        why += f"; {near}" if near else ""
        raise RequestError(f"cannot read the recovery {text!r}", why, "for example bn,reconstruct,distill:200")
    return RecoveryStep(_KINDS[kind], int(number or 0))


@dataclass(frozen=True)
class Recovery:
    """How the pruned model is recovered, step by step.

    data: batches for `distill` and `finetune`; default: those of the job. lr: learning rate of both. ridge: penalty of
    `reconstruct`. imitate: maps the dense model to the loss of `distill`; default: divergence of the logits.
    """

    steps: tuple[RecoveryStep, ...] = ()
    data: Iterable[Any] | None = None
    lr: float = 1e-4
    ridge: float = 1e-2
    imitate: Callable[[nn.Module], Loss] | None = None


@dataclass(frozen=True)
class Job:
    """A request to `run`. `metric` and `max_drop` are a gate: the quality may fall by at most `max_drop`.

    data, loss: for scores and recovery. factory: makes the dense model, for `load`. source: the Hugging Face folder
    from which the model was read. command: the command line that repeats the job. about: one line on model and data
    for the record. by_hand: units, ratios and counts by layer name. auto: `prune` plans, cuts and recovers; only the
    seed of the recipe is used.
    """

    recipe: Recipe
    target: Target | None
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    recovery: Recovery = field(default_factory=Recovery)
    metric: Metric | None = None
    max_drop: float | None = None
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    by_hand: ByHand = field(default_factory=ByHand)
    factory: str | None = None
    source: str | None = None
    command: str = ""
    about: str = ""
    auto: bool = False

    @property
    def recovery_data(self) -> Iterable[Any] | None:
        """Batches for distillation and fine-tuning."""
        return self.data if self.recovery.data is None else self.recovery.data

    def check(self) -> None:
        """Errors: RequestError when a part of the job needs another that is missing."""
        for step in self.recovery.steps:
            trained = step.kind in ("distill", "finetune")
            if (self.recovery_data if trained else self.data) is None:
                raise RequestError(f"cannot recover by {step}", "there is no data", "pass data=")
            if step.kind == "finetune" and self.loss is None:
                raise RequestError("cannot fine-tune", "there is no loss", "pass loss=, or recover by distill:STEPS")
        if self.max_drop is not None and self.metric is None:
            raise RequestError("cannot check max_drop=", "there is no measure of quality", "pass metric=")

    def quality(self, model: nn.Module) -> Quality:
        """The metrics of a model by name; none if the job has no metric."""
        if self.metric is None:
            return {}
        value = self.metric(model)
        if isinstance(value, Mapping):
            if not value:
                raise RequestError("metric= must return one number", "it returned an empty mapping", "name one number")
            return {str(name): number_of(number, f"metric= for {name!r}") for name, number in value.items()}
        return {"quality": number_of(value, "metric=")}
