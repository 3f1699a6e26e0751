"""Weights in plain containers: their multiply-adds count, their parameters do not, and every number says so."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.measure.count import count_work
from prunella.model.unregistered import unregistered
from prunella.planning.coverage import UNREGISTERED, not_registered

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
LINE = f"{UNREGISTERED}: held"


class Net(nn.Module):
    """8 -> 16 -> 16 -> 4; the last layer is held by `wrap` and found by `get`."""

    def __init__(self, wrap: Callable[[nn.Module], Any], get: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.held, self.get = wrap(nn.Linear(16, 4)), get

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return self.get(self.held)(h)  # type: ignore[no-any-return]


HELD: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any], str]] = {
    "tuple": (lambda m: (m,), lambda held: held[0], "held[0].weight"),
    "list": (lambda m: [m], lambda held: held[0], "held[0].weight"),
    "dict": (lambda m: {"last": m}, lambda held: held["last"], "held['last'].weight"),
    "nested": (lambda m: {"all": [(m,)]}, lambda held: held["all"][0][0], "held['all'][0][0].weight"),
    "inner": (lambda m: [nn.Sequential(m, nn.Tanh())], lambda held: held[0], "held[0].0.weight"),
}


@pytest.mark.parametrize("name", HELD)
def test_the_plan_the_inspection_and_the_report_say_it_with_the_share(name: str) -> None:
    wrap, get, weight = HELD[name]
    model = Net(wrap, get).eval()
    plan = pr.plan(model, X, target=pr.MACs(0.7))
    share, macs = "14.3%", 2 * (8 * 16 + 16 * 16 + 16 * 4)  # 128 of 896
    assert plan.before.macs == macs == count_work(model, X).macs and plan.before.params == 9 * 16 + 17 * 16
    (line,) = plan.caveats
    assert line.startswith(f"{UNREGISTERED}: {weight}, {share} of the MACs") and str(plan).startswith(line)
    small = pr.shrink(model, plan)
    report = pr.report(model, small, X)
    assert report.caveats == plan.caveats == pr.report(model, small, X, plan=plan).caveats
    assert str(report).splitlines()[1] == line
    masks = pr.plan(model, X, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    assert line in masks.caveats


def test_two_runs_of_the_model_count_once_and_each_weight_is_named() -> None:
    class Modes(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return (out, out * 2) if self.training else out

    model = Modes(*HELD["tuple"][:2]).eval()
    graph = couple(model, X)
    assert graph.unregistered == {"held[0].weight": 128} == count_work(model, X).unregistered
    assert couple(model, X, [X[:1]]).unregistered["held[0].weight"] == 128
    text = not_registered({f"w{k}": k for k in range(1, 6)}, 30)
    assert "w5, w4, w3 and 2 more, 50%" in text or "w5, w4, w3 and 2 more, 50.0%" in text


def test_what_is_registered_or_is_not_run_is_not_named() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)
            self.order = [self.net, self.last]
            self.teacher = (nn.Linear(8, 4),)  # hidden on purpose, and never called

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    model = Shares().eval()
    assert list(unregistered(model)) == ["teacher[0].weight", "teacher[0].bias"]
    assert pr.plan(model, X, target=pr.MACs(0.5)).caveats == ()


def test_a_search_ends() -> None:
    model = nn.Module()
    cycle: list[Any] = [nn.Parameter(torch.ones(2, 2))]
    cycle.append(cycle)
    model.many = list(range(10_000))
    model.cycle, model.other = cycle, SimpleNamespace(net=nn.Linear(2, 2))
    holder = type("Holder", (nn.Module,), {})()
    vars(holder).update(cycle=cycle, many=model.many)
    assert list(unregistered(holder)) == ["cycle[0]"]
