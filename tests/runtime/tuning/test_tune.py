"""What is measured for a layer, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import prunella as pr
from prunella.measure.timing import Ratio
from prunella.runtime.fx.fuse import Fused, fusions, traced
from prunella.runtime.kernels.config import Activation, Config, Kind, Precision
from prunella.runtime.tuning import tune
from prunella.runtime.tuning.choice import Geometry, Problem, Route, describe, from_json, to_json
from prunella.runtime.tuning.eligible import candidates
from prunella.runtime.tuning.tune import Tuner, blocks_of, configs_for, decide
from tests.runtime.standin import Calls
from tests.runtime.test_sparse import IMAGE, net


def test_the_quickest_of_each_side_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune, "own_clock", lambda *_: lambda: now[0])

    def work(seconds: float) -> Callable[[], object]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    runs = {
        Route.TORCH: work(0.20),
        Route.ONEDNN: work(0.26),
        Config(Kind.ROWS): work(0.28),
        Config(Kind.CSR): work(0.17),
    }
    verdict = decide(runs, Problem(4), 0.1, 0)
    assert verdict.choice == verdict.best == Config(Kind.CSR) and verdict.ratio is not None
    assert verdict.ratio.value == pytest.approx(0.20 / 0.17)
    again = decide({c: runs[c] for c in (Route.TORCH, Config(Kind.ROWS))}, Problem(4), 0.1, 0)
    assert again.choice is Route.TORCH and again.best == Config(Kind.ROWS)


@pytest.mark.parametrize(("ratio", "wins"), [(Ratio(1.2, 1.1, 1.3), True), (Ratio(1.2, 0.9, 1.3), False)])
def test_only_a_sure_gain_wins(monkeypatch: pytest.MonkeyPatch, ratio: Ratio, wins: bool) -> None:
    class Measured:
        def __init__(self) -> None:
            self.ratio = ratio

    monkeypatch.setattr(tune, "compare_latency", lambda *args, **kwargs: Measured())
    monkeypatch.setattr(tune, "screen", lambda runs, seconds, base, before, device: dict.fromkeys(runs, 1.0))
    rival = Config(Kind.ROWS)
    verdict = decide({Route.TORCH: lambda: None, rival: lambda: None}, Problem(4), 0.1, 0)
    assert verdict.choice == (rival if wins else Route.TORCH) and verdict.best == rival


def test_what_seems_quicker_is_measured_until_it_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    ratios = iter([Ratio(1.5, 0.9, 2.0), Ratio(1.4, 1.2, 1.6), Ratio(1.05, 0.9, 1.2), *[Ratio(1.5, 0.9, 2.0)] * 4])

    def measured(*_: Any, rounds: int, **__: Any) -> Any:
        found.append(rounds)
        return SimpleNamespace(ratio=next(ratios))

    monkeypatch.setattr(tune, "compare_latency", measured)
    rival = Config(Kind.ROWS)
    monkeypatch.setattr(tune, "screen", lambda runs, *_: {Route.TORCH: 2.0, rival: 1.0})
    runs = {Route.TORCH: lambda: None, rival: lambda: None}
    assert decide(runs, Problem(4), 0.1, 0).choice == rival and found == [5, 20]
    assert decide(runs, Problem(4), 0.1, 0).choice is Route.TORCH and found == [5, 20, 5]  # too little to look again
    assert decide(runs, Problem(4), 0.1, 0).choice is Route.TORCH and found[3:] == [5, 20, 80, 101]


def test_alike_layers_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tune, "candidates", lambda *args, **how: asked.append(args) or {})
    monkeypatch.setattr(tune, "decide", lambda runs, problem, seconds, seed, before: problem)
    tuner, weight = Tuner(), torch.eye(8)
    tuner.linear(weight, None, (Problem(1), Problem(2)))
    tuner.linear(weight.flip(0), None, (Problem(2),))
    tuner.linear(weight, torch.ones(8), (Problem(2),))
    assert len(asked) == 3


def test_choices_are_plain_data() -> None:
    there = [route for route in Route if route.portable]  # those of accelerators: test_accelerated.py
    for choice in (*there, Config(Kind.DECODE, Precision.INT8, 2, 8, 64)):
        assert from_json(to_json(choice)) == choice and describe(choice)


def test_blocks_are_seen(kernels: Calls) -> None:
    mask = (torch.arange(6) % 2 == 0).expand(16, 6)
    assert blocks_of(mask * 1.0) == 16
    broken = mask.clone()
    broken[8:, 1] = True
    assert blocks_of(broken * 1.0) == 8
    broken[3, 3] = True
    assert blocks_of(broken * 1.0) == 1
    kinds = [c.kind for c in configs_for(mask * 1.0, 64, Precision.FP32)]
    assert kinds[0] is Kind.BLOCK16 and Kind.BLOCK8 not in kinds


FUSED = [
    Fused(),
    Fused(None, Activation.SILU, residual=True),
    Fused("norm", Activation.RELU),
    Fused("norm", Activation.NONE, residual=True),
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_measured_with_what_is_fused(fused: Fused, channels_last: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    geometry, problem = Geometry((3, 3), (2, 1), (1, 1)), Problem(2 * 4 * 8, (2, 4, 8, 8))
    options: Any = {"channels_last": channels_last, "fused": fused}
    runs = tune.candidates(weight, bias, problem, geometry, Precision.FP32, 0, {}, **options)
    assert set(runs) == {Route.TORCH, Config(Kind.ROWS), Config(Kind.GROUPS)}
    inside = 1 if fused.norm is None else (1 + nn.BatchNorm2d(1).eps) ** -0.5  # of a batch norm that is new
    for run in runs.values():
        x, residual = run.args[:2]
        assert (residual is not None) == fused.residual and x.is_contiguous() is not channels_last
        wanted = functional.conv2d(x, weight, bias, (2, 1), 1) * inside + (1.0 if fused.residual else 0.0)
        wanted = functional.silu(wanted) if fused.activation is Activation.SILU else wanted
        wanted = wanted.relu() if fused.activation is Activation.RELU else wanted
        with torch.inference_mode():
            found = run()
        torch.testing.assert_close(found, wanted)
        assert residual is None or (residual == 1).all()  # what is applied in memory is applied in the layer's own


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize("fuse", [True, False])
def test_the_trace_says_what_is_fused(monkeypatch: pytest.MonkeyPatch, fuse: bool) -> None:
    seen, candidates = list[Fused](), tune.candidates

    def spied(*args: Any, **how: Any) -> Any:
        seen.append(how["fused"])
        return candidates(*args, **how)

    monkeypatch.setattr(tune, "candidates", spied)
    pr.sparse(net(), IMAGE, fuse=fuse)
    expected = {Fused("norm", Activation.RELU), Fused("norm", Activation.RELU, residual=True), Fused()}
    assert set(seen) == (expected if fuse else {Fused()})


def test_nothing_is_fused_with_what_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.one(self.one(x)).relu() + self.two(x).relu()
            return made

    model = Twice().eval()
    program = traced(model, candidates(model), torch.randn(1, 2, 3, 3))
    assert program is not None
    found = fusions(program, {"one": model.one, "two": model.two})
    assert found == {"one": Fused(), "two": Fused(None, Activation.RELU)}


def test_layers_that_differ_in_what_is_fused_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tune, "candidates", lambda *args, **how: asked.append(how["fused"]) or {})
    monkeypatch.setattr(tune, "decide", lambda runs, problem, seconds, seed, before: problem)
    tuner, weight, geometry = Tuner(), torch.randn(2, 2, 1, 1), Geometry((1, 1))
    problem = (Problem(9, (1, 2, 3, 3)),)
    for fused in (Fused("a"), Fused("b"), Fused("b", Activation.RELU), Fused()):
        tuner.conv(weight, None, geometry, problem, fused)
    assert len(asked) == 3  # which norm it is does not matter
