"""One count for objects that people have: plan, count and report agree to the last digit, before and after a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.measure.count import count_work
from prunella.model.torch_masks import with_plain_weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def torch_pruned() -> nn.Module:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.3)  # type: ignore[no-untyped-call]
    return model


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    model: nn.Module = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return model


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 2)


class Then(nn.Module):
    """A layer that gives more than a tensor, then two layers of 8 -> 16 -> 4."""

    def __init__(self, first: nn.Module, width: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.call = first, call
        self.rest = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.call(self.first, x))  # type: ignore[no-any-return]


class Repeats(nn.Module):
    """Two layers that run twice; with `shared`, other layers that have the same weight."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        if shared:
            self.c.weight = self.a.weight
        else:
            self.c = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.c(self.b(torch.relu(self.a(x))))))  # type: ignore[no-any-return]


FLAT = 2 * (8 * 16 + 16 * 16 + 16 * 4)
REST = 10 * (8 * 16 + 16 * 4)
ATTENTION = 10 * 4 * 8 * 8 + 2 * 2 * 5 * 5 * 8  # four projections; queries by keys, and scores by values
ENCODER = 2 * (ATTENTION + 10 * 2 * 8 * 32)
CASES: dict[str, tuple[Callable[[], Any], bool, int]] = {
    "parallel": (lambda: nn.DataParallel(net()), False, FLAT),
    "compiled": (lambda: torch.compile(net(), backend="eager"), False, FLAT),  # type: ignore[misc]
    "averaged": (lambda: AveragedModel(net()), False, FLAT),
    "torch pruned": (torch_pruned, False, FLAT),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(net()[0]), *net()[1:]), False, FLAT),  # type: ignore[no-untyped-call]
    "adapted": (adapted, False, FLAT + 2 * (2 * 24 + 2 * 32)),
    "encoder": (encoder, True, ENCODER),
    "parallel encoder": (lambda: nn.DataParallel(encoder()), True, ENCODER),
    "lstm": (
        lambda: Then(nn.LSTM(8, 8, batch_first=True), 8, lambda m, x: m(x)[0]),
        True,
        10 * 4 * 8 * (8 + 8) + REST,
    ),
    "attention": (
        lambda: Then(nn.MultiheadAttention(8, 2, batch_first=True), 8, lambda m, x: m(x, x, x)[0]),
        True,
        ATTENTION + REST,
    ),
    "shared": (lambda: Repeats(shared=True), False, 4 * 2 * 8 * 16),
    "twice": (lambda: Repeats(shared=False), False, 4 * 2 * 8 * 16),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", CASES)
def test_every_count_is_the_same_number(name: str) -> None:
    build, sequence, macs = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(2, 5, 8) if sequence else torch.randn(2, 8)
    plan = pr.plan(model, x, target=pr.MACs(0.85))
    small = pr.shrink(model, plan)
    measures = {metric.name: metric for metric in pr.report(model, small, x, plan=plan).metrics}
    assert macs == plan.before.macs == count_work(model, x).macs == measures["multiply-adds"].before
    assert macs == couple(with_plain_weights(model), x).macs()
    assert plan.after.macs == count_work(small, x).macs == measures["multiply-adds"].after
    assert plan.before.params == pr.metrics.count(model).params == measures["parameters"].before
    assert plan.after.params == pr.metrics.count(small).params == measures["parameters"].after
