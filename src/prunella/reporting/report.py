"""The dense model and the pruned one side by side: counted, measured, compared, as one frozen value.

`str(report)` is a table, `report.json()` is data, `page.write_page` makes the HTML page.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from prunella._version import __version__
from prunella.graph.cut.block_surgery import new_name
from prunella.graph.data import Frozen
from prunella.graph.verify import relative_error
from prunella.io.json import encode, plain
from prunella.measure.count import WorkCount, count, count_work, effective
from prunella.measure.formats import html_table
from prunella.measure.profile import peak_memory, time_by_layer
from prunella.measure.text import byte_size, duration, percent, short_count, significant, table
from prunella.measure.timing import Comparison, compare_latency
from prunella.model.batches import data_errors
from prunella.model.device import device_name, devices_of, on_accelerator
from prunella.model.forward import forward, outputs_of
from prunella.model.state import mode
from prunella.model.torch_masks import with_plain_weights
from prunella.model.trees import own, tensors
from prunella.planning.coverage import lines, not_counted, not_registered
from prunella.planning.plan import Plan
from prunella.reporting.section import Section
from prunella.types import Inputs

Quality = Sequence[tuple[str, float, float]]
Unit = Literal["score", "count", "bytes", "seconds"]


@dataclass(frozen=True)
class Metric:
    """One measure before and after. `interval`: 95 %, of the ratio before / after, where it was measured.

    cut: the value between the cut and its recovery, where there was one.
    """

    name: str
    before: float
    after: float
    unit: Unit
    interval: tuple[float, float] | None = None
    note: str = ""
    cut: float | None = None

    @property
    def remaining(self) -> float:
        """`after / before`."""
        return self.after / self.before if self.before else math.nan

    @property
    def change(self) -> str:
        """The change in words: a difference for scores, else a percentage."""
        if self.note:
            return self.note
        if self.unit == "score":
            return f"{self.after - self.before:+.3g}"
        if not self.before:
            return ""
        return "same" if self.after == self.before else f"{self.remaining - 1:+.1%}"


@dataclass(frozen=True)
class LayerLine:
    """One layer with a weight. `width`: (kept, total) units by the plan, if it was pruned."""

    name: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    sparsity: float
    macs_before: int
    macs_after: int
    seconds_before: float
    seconds_after: float

    @property
    def changed(self) -> bool:
        """Whether its shape has changed."""
        return self.shape_before != self.shape_after


@dataclass(frozen=True)
class LayerWidth:
    """The kept part of one group of units, or of one masked weight."""

    name: str
    kind: str
    kept: int
    total: int


@dataclass(frozen=True)
class Curve:
    """Quality while the model recovers. `reference`: the dense model's value."""

    points: tuple[tuple[float, float], ...]
    name: str = "quality"
    steps: str = "step"
    reference: float | None = None


@dataclass(frozen=True)
class Report:
    """A pruned model compared with its dense model."""

    model: str
    inputs: str
    metrics: tuple[Metric, ...]
    latency: Comparison
    difference: float
    layers: tuple[LayerLine, ...]
    widths: tuple[LayerWidth, ...]
    frozen: tuple[Frozen, ...]
    curve: Curve | None
    target: tuple[str, str] | None
    recipe: Mapping[str, Any]
    environment: Mapping[str, str]
    command: str = ""
    compared_on: str = "the inputs above"
    pass_seconds: tuple[float, float] = (0.0, 0.0)
    sections: tuple[Section, ...] = ()
    caveats: tuple[str, ...] = ()
    """The parts of the model that the numbers do not cover; printed first."""

    def adding(self, *sections: Section) -> Report:
        """This report with further parts: side effects, the curves of an experiment."""
        return replace(self, sections=(*self.sections, *sections))

    def with_cut(self, quality: Mapping[str, float]) -> Report:
        """This report with the scores of the pruned model before its recovery, by name."""
        scores = [m if m.unit != "score" else replace(m, cut=quality.get(m.name)) for m in self.metrics]
        return replace(self, metrics=tuple(scores))

    @property
    def recovered(self) -> bool:
        """Whether the scores of the pruned model before its recovery are known."""
        return any(m.cut is not None for m in self.metrics)

    def metric(self, name: str) -> Metric:
        """The metric of that name; KeyError if there is none."""
        match = next((metric for metric in self.metrics if metric.name == name), None)
        if match is None:
            raise KeyError(name)
        return match

    @property
    def verdict(self) -> str:
        """One sentence: smaller by, faster by with its interval, quality before and after."""
        scores = [_score(m) for m in self.metrics if m.unit == "score"]
        parts = [*self.smaller, f"{self.latency.ratio.verdict}", *scores[:2]]
        return "; ".join(parts)

    @property
    def smaller(self) -> tuple[str, ...]:
        """The reductions, those of the multiply-adds first; `not smaller` if there are none."""
        named = (("multiply-adds", "multiply-adds"), ("parameters", "parameters"), ("non-zero weights", "weights"))
        smaller = [(label, m) for name, label in named for m in self.metrics if m.name == name and m.after < m.before]
        parts = [f"{percent(1 - m.remaining, 0)} fewer {label}" for label, m in smaller]
        return tuple(parts[:2]) if parts else ("not smaller",)

    def data(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        body = asdict(self)
        body["sections"] = [asdict(replace(section, charts=())) for section in self.sections]
        body["metrics"] = [{**asdict(m), "change": m.change} for m in self.metrics]
        ratio = self.latency.ratio
        body["latency"] = {
            "median_seconds": {one.name: one.median for one in self.latency.latencies},
            "quartiles_seconds": {one.name: one.quartiles for one in self.latency.latencies},
            "ratio": asdict(ratio),
            **{key: getattr(self.latency, key) for key in ("rounds", "warmup", "threads", "device", "seed")},
        }
        return {"verdict": self.verdict, **body}

    def json(self) -> str:
        """The report as JSON text; numbers that are not finite become null."""
        return encode(plain(self.data()), indent=2, sort=False)

    def __str__(self) -> str:
        columns: list[tuple[str, Callable[[Metric], str]]] = [
            ("", lambda m: m.name),
            ("dense", lambda m: shown(m.before, m.unit)),
            ("cut", lambda m: "" if m.cut is None else shown(m.cut, m.unit)),
            ("recovered" if self.recovered else "pruned", lambda m: shown(m.after, m.unit)),
            ("change", lambda m: m.change),
        ]
        columns = columns if self.recovered else [column for column in columns if column[0] != "cut"]
        rows = [[cell(metric) for _, cell in columns] for metric in self.metrics]
        table_text = table([name for name, _ in columns], rows, right=range(1, len(columns) - 1))
        headline = f"{self.model} on {self.inputs}: {self.verdict}"
        difference = f"largest output difference: {self.difference:.2g} of the largest output, on {self.compared_on}"
        end = [difference if math.isfinite(self.difference) else "outputs have other shapes", *self._measured()]
        parts = [line for section in self.sections for line in ("", str(section))]
        return "\n".join([headline, *self.caveats, "", table_text, "", *end, *parts])

    def _repr_html_(self) -> str:
        """The report in a notebook: the verdict and the measures."""
        rows = [(m.name, shown(m.before, m.unit), shown(m.after, m.unit), m.change) for m in self.metrics]
        header = ("", "dense", "recovered" if self.recovered else "pruned", "change")
        return html_table(self.verdict, header, rows, (*self.caveats, *self._measured()))

    def _measured(self) -> list[str]:
        took = self.latency
        how = f"medians of {took.rounds} interleaved rounds, {took.threads} threads"
        lines = [f"latency: {how}, {self.environment['processor']}"]
        if self.target:
            lines.insert(0, f"asked {self.target[0]}, got {self.target[1]}")
        return lines


def report(
    dense: nn.Module,
    small: nn.Module,
    inputs: Inputs,
    *,
    plan: Plan | None = None,
    quality: Quality = (),
    curve: Curve | None = None,
    command: str = "",
    rounds: int = 40,
) -> Report:
    """Compare `small` with `dense` on one batch: counts, latency side by side, peak memory, output difference.

    plan: adds the kept units of each group, the frozen axes with reasons, and the target. quality: (name, before,
    after) of your own measures. curve: the quality during recovery. command: the command that repeats the run. rounds:
    of the latency measurement. Both models run in eval mode and do not change.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> small = pr.shrink(model, pr.plan(model, torch.randn(2, 8), target=pr.MACs(0.5)))
        >>> compared = pr.report(model, small, torch.randn(2, 8), rounds=5)
        >>> [(metric.name, metric.before, metric.after) for metric in compared.metrics[:2]]
        [('parameters', 212, 108), ('multiply-adds', 384, 192)]
    """
    example = own(inputs)
    with mode(dense, training=False, compiled=True), mode(small, training=False, compiled=True), torch.no_grad():
        with data_errors(dense, inputs, name="the example inputs"):
            forward(dense, inputs)
        latency = compare_latency(
            {
                "dense": lambda: forward(dense, example, copy=False),
                "pruned": lambda: forward(small, example, copy=False),
            },
            rounds=rounds,
            device=devices_of(dense, small),
        )
        outputs = [[t.cpu() for t in outputs_of(model, inputs)] for model in (dense, small)]
    dense, small = with_plain_weights(dense), with_plain_weights(small)
    seconds = time_by_layer({"dense": dense, "pruned": small}, inputs)
    work = count_work(dense, inputs), count_work(small, inputs)
    return Report(
        model=type(dense).__name__,
        inputs=" + ".join("×".join(map(str, t.shape)) for t in tensors(inputs)),
        metrics=_metrics(dense, small, inputs, quality, latency, work),
        latency=latency,
        difference=relative_error(*outputs),
        layers=_layers(dense, small, work, (seconds["dense"], seconds["pruned"]), plan.dropped if plan else {}),
        widths=tuple(LayerWidth(row.name, row.kind, row.kept, row.total) for row in plan.rows) if plan else (),
        frozen=plan.frozen if plan else (),
        curve=curve,
        target=(str(plan.target), f"{plan.target.name}={plan.got:.4g}") if plan and plan.target else None,
        recipe=dict(plan.recipe) if plan else {},
        environment=environment(latency),
        command=command,
        pass_seconds=(sum(seconds["dense"].values()), sum(seconds["pruned"].values())),
        caveats=_caveats(dense, work, plan),
    )


def _score(metric: Metric) -> str:
    cut = "" if metric.cut is None else f"{significant(metric.cut)} cut → "
    return f"{metric.name} {significant(metric.before)} → {cut}{significant(metric.after)}"


def environment(latency: Comparison) -> dict[str, str]:
    """Versions and the machine, without names of people, hosts or folders."""
    return {
        "prunella": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(latency.device),
        "threads": f"{latency.threads} of {os.cpu_count()} cores",
        "rounds": f"{latency.rounds} after {latency.warmup} warm-up calls",
        "seed": str(latency.seed),
    }


def shown(value: float, unit: Unit) -> str:
    """A metric for people, by its unit: `11.7 M`, `44.6 MB`, `12.3 ms`."""
    return {"score": significant, "count": short_count, "bytes": byte_size, "seconds": duration}[unit](value)


def _metrics(
    dense: nn.Module,
    small: nn.Module,
    inputs: Inputs,
    quality: Quality,
    latency: Comparison,
    work: tuple[WorkCount, WorkCount],
) -> tuple[Metric, ...]:
    a, b = count(dense), count(small)
    ratio, (first, second) = latency.ratio, latency.latencies[:2]
    metrics = [Metric(name, before, after, "score") for name, before, after in quality]
    metrics += [Metric("parameters", a.params, b.params, "count")]
    if b.sparsity - a.sparsity >= 0.005:  # embeddings have a row of zeros for padding from the start
        metrics.append(Metric("non-zero weights", a.nonzero, b.nonzero, "count"))
        without_zeros = effective(dense, work[0]), effective(small, work[1])
        metrics.append(Metric("effective multiply-adds", *without_zeros, "count"))
    return (
        *metrics,
        Metric("multiply-adds", work[0].macs, work[1].macs, "count"),
        Metric("size on disk", a.bytes, b.bytes, "bytes"),
        Metric("latency", first.median, second.median, "seconds", (ratio.low, ratio.high), ratio.verdict),
        Metric("peak memory", peak_memory(dense, inputs), peak_memory(small, inputs), "bytes"),
    )


def _layers(
    dense: nn.Module,
    small: nn.Module,
    work: tuple[WorkCount, WorkCount],
    seconds: tuple[Mapping[str, float], Mapping[str, float]],
    dropped: Mapping[str, tuple[str, ...]],
) -> tuple[LayerLine, ...]:
    """Leaf modules of both models that have a weight of two axes or more, under their names in the dense one."""
    others, lines = dict(small.named_modules()), []
    for name, module in dense.named_modules():
        new_path = new_name(dense, dropped, name) or ""
        old, new = getattr(module, "weight", None), getattr(others.get(new_path), "weight", None)
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old.dim() < 2:
            continue
        zero = 1 - int(torch.count_nonzero(new)) / new.numel() if new.numel() else 0.0
        cost = work[0].by_module.get(name, 0), work[1].by_module.get(new_path, 0)
        took = seconds[0].get(name, 0.0), seconds[1].get(new_path, 0.0)
        lines.append(LayerLine(name, tuple(old.shape), tuple(new.shape), zero, cost[0], cost[1], took[0], took[1]))
    return tuple(lines)


def _caveats(dense: nn.Module, work: Sequence[WorkCount], plan: Plan | None) -> tuple[str, ...]:
    """The parts that the numbers do not cover: those named by the plan, and operations of unknown cost."""
    sizes = {name: parameter.numel() for name, parameter in dense.named_parameters()}
    calls = {name: max(one.uncounted.get(name, 0) for one in work) for one in work for name in one.uncounted}
    hidden = {name: {*work[0].hidden.get(name, ()), *work[1].hidden.get(name, ())} for name in calls}
    said = plan.caveats if plan else ()
    own = lines(not_counted(calls, hidden, sizes), not_registered(work[0].unregistered, work[0].macs))
    subjects = {line.partition(":")[0] for line in said}
    return (*(line for line in own if line.partition(":")[0] not in subjects), *said)


def _processor(device: str) -> str:
    if on_accelerator(device):
        return ", ".join(device_name(torch.device(name)) for name in device.split(", "))
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
