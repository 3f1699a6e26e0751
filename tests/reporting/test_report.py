"""The report says what was counted and measured, and no more."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

from prunella.graph.data import Frozen
from prunella.measure.timing import Comparison, LatencySamples, Ratio
from prunella.planning.accounting import Amount, Row
from prunella.planning.plan import Plan
from prunella.reporting.report import Curve, Metric, Report, report, shown
from prunella.targets import MACs, Sparsity, Target


class Net(nn.Module):
    """Two layers and a name that a page must escape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


def make_plan(target: Target) -> Plan:
    return Plan(
        recipe={"criterion": "taylor"},
        target=target,
        before=Amount(200.0, 1000.0, 800.0, 192.0),
        after=Amount(100.0, 480.0, 400.0, 96.0),
        rows=(Row("up", "channel", 8, 16, 0, 0, 0.0, 0.0),),
        frozen=(Frozen("down.weight", 0, 4, "output of the model", "net.py:7"),),
    )


FASTER = Ratio(1.62, 1.55, 1.70)


def made(ratio: Ratio = FASTER, *, target: Target | None = None) -> Report:
    """A report with a latency that does not depend on this machine."""
    torch.manual_seed(0)
    dense, small = Net(16), Net(8)
    with torch.no_grad():
        small.up.weight[:2] = 0
    found = report(
        dense,
        small,
        torch.ones(5, 8),
        plan=make_plan(target or MACs(0.5)),
        quality=(("accuracy", 0.9132, 0.9048),),
        curve=Curve(((0.0, 0.5), (10.0, 0.9)), "accuracy", reference=0.9132),
        command="prunella run net:make",
        rounds=5,
    )
    samples = (LatencySamples("dense", (0.002, 0.003, 0.0025)), LatencySamples("pruned", (0.001, 0.0012, 0.0011)))
    latency = Comparison(samples, (ratio,), 1, "cpu", 5, 5, 0)
    metrics = tuple(
        Metric("latency", 0.0025, 0.0011, "seconds", (ratio.low, ratio.high), ratio.verdict)
        if m.name == "latency"
        else m
        for m in found.metrics
    )
    return Report(**{**vars(found), "latency": latency, "metrics": metrics})


def test_numbers_by_hand() -> None:
    found = made()
    assert found.metric("parameters") == Metric("parameters", 8 * 16 + 16 + 16 * 4 + 4, 8 * 8 + 8 + 8 * 4 + 4, "count")
    assert found.metric("multiply-adds") == Metric("multiply-adds", 5 * (128 + 64), 5 * (64 + 32), "count")
    assert found.metric("size on disk") == Metric("size on disk", 4 * 212, 4 * 108, "bytes")
    assert found.metric("non-zero weights") == Metric("non-zero weights", 192, 96 - 16, "count")
    up = found.layers[0]
    assert (up.name, up.shape_before, up.shape_after, up.sparsity) == ("up", (16, 8), (8, 8), 0.25)
    assert (up.macs_before, up.macs_after, up.changed) == (640, 320, True)
    assert found.target == ("macs=0.5", "macs=0.48")
    assert made(target=Sparsity(0.5)).target == ("sparsity=0.5", "sparsity=0.5")
    with pytest.raises(KeyError):
        found.metric("beauty")


def test_difference_is_of_the_outputs() -> None:
    net = Net(4)
    assert report(net, net, torch.ones(2, 8), rounds=5).difference == 0
    other = Net(4)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        net.down.bias.fill_(0.0)
        net.down.weight.fill_(0.0)
        net.down.bias[0], other.down.bias[:] = 2.0, net.down.bias
        other.down.weight.fill_(0.0)
        other.down.bias.copy_(torch.tensor([2.0, 0.5, 0.0, 0.0]))
    assert report(net, other, torch.ones(2, 8), rounds=5).difference == 0.25


def test_the_verdict() -> None:
    assert made().verdict == (
        "50% fewer multiply-adds; 49% fewer parameters; 1.62x faster [1.55, 1.70]; accuracy 0.9132 → 0.9048"
    )
    assert "no speed-up on this device (1.01x [0.97, 1.06])" in made(Ratio(1.01, 0.97, 1.06)).verdict
    net = Net(4)
    assert report(net, net, torch.ones(2, 8), rounds=5).verdict.startswith("not smaller; ")


def test_the_table_is_aligned() -> None:
    lines = str(made()).splitlines()
    rows = [line for line in lines if line.startswith(("parameters", "multiply-adds", "latency  ", "accuracy"))]
    assert len(rows) == 4
    assert {
        line.index(word) for line, word in zip(rows, ("-0.0084", "-49.1%", "-50.0%", "1.62x faster"), strict=True)
    } == {rows[0].index("-0.0084")}
    assert "asked macs=0.5, got macs=0.48" in lines
    assert "latency: medians of 5 interleaved rounds, 1 threads" in lines[-1]


def test_json_is_data() -> None:
    data = json.loads(made().json())
    assert data["verdict"] == made().verdict
    assert data["latency"]["ratio"] == {"value": 1.62, "low": 1.55, "high": 1.70}
    assert data["latency"]["median_seconds"] == {"dense": 0.0025, "pruned": 0.0011}
    assert data["frozen"][0]["where"] == "net.py:7" and data["layers"][0]["shape_after"] == [8, 8]
    assert {m["name"]: m["change"] for m in data["metrics"]}["parameters"] == "-49.1%"
    lost = Report(**{**vars(made()), "difference": math.inf})
    assert json.loads(lost.json())["difference"] is None


def test_the_environment_names_no_one() -> None:
    text = made().json()
    assert made().environment.keys() == {
        *("prunella", "torch", "python", "system", "processor", "threads", "rounds", "seed"),
    }
    assert "/home" not in text and "/root" not in text


def test_models_are_left_as_they_were() -> None:
    dense, small = Net(4).train(), Net(4).eval()
    report(dense, small, torch.ones(2, 8), rounds=5)
    assert dense.training and not small.training and not dense.up._forward_hooks
    assert all(parameter.grad is None for parameter in dense.parameters())
    with pytest.raises(FrozenInstanceError):
        made().command = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (11_689_512, "count", "11.7 M"),
        (86_400, "count", "86.4 k"),
        (999, "count", "999"),
        (4.09e9, "count", "4.09 G"),
        (44.6e6, "bytes", "44.6 MB"),
        (12, "bytes", "12 B"),
        (0.01234, "seconds", "12.3 ms"),
        (2.5, "seconds", "2.5 s"),
        (0.91324, "score", "0.9132"),
        (math.nan, "score", "–"),
    ],
)
def test_numbers_for_people(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text  # type: ignore[arg-type]


def test_changes() -> None:
    assert Metric("x", 0.5, 0.25, "score").change == "-0.25"
    assert Metric("x", 4, 5, "count").change == "+25.0%"
    assert Metric("x", 4, 4, "count").change == "same"
    assert Metric("x", 0, 4, "count").change == ""
