"""The oracle can fail: each way of cutting wrongly is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunella.graph.cut.changes import attributes, changes, cuts
from prunella.graph.data import Graph
from prunella.graph.verify import verify
from tests import oracle
from tests.zoo import convolutional as conv
from tests.zoo import odd

Cuts = dict[str, dict[int, Tensor]]
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shifted(found: Cuts) -> Cuts:
    """Other columns than the rows that went."""
    found["conv2.weight"][1] = (found["conv2.weight"][1] + 1) % 8
    return found


def without_statistics(found: Cuts) -> Cuts:
    """Running means of the wrong channels."""
    found["bn1.running_mean"][0] = found["bn1.running_mean"][0].flip(0)
    return found


def one_more(found: Cuts) -> Cuts:
    """One neuron more than was asked, on both sides."""
    for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        found[name][axis] = found[name][axis][1:]
    return found


@pytest.mark.parametrize("spoil", [shifted, without_statistics, one_more])
def test_wrong_cuts_are_found(spoil: Callable[[Cuts], Cuts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "cuts", lambda graph, keep: spoil(cuts(graph, keep)))
    with pytest.raises(AssertionError, match=r"differs|promised"):
        oracle.check_exact(conv.VGG(), IMAGE)


def test_a_forgotten_attribute_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "attributes", lambda graph, keep: {})
    with pytest.raises((AssertionError, RuntimeError)):
        oracle.check_exact(odd.AttentionBlock(), torch.randn(2, 5, 16), fraction=0.5)


def test_a_wrong_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = oracle.couple

    def optimist(model: Any, inputs: Any) -> Graph:
        graph = real(model, inputs)
        return replace(graph, costs=graph.costs[:-1])

    monkeypatch.setattr(oracle, "couple", optimist)
    with pytest.raises(AssertionError):
        oracle.check_exact(conv.VGG(), IMAGE)


def test_a_touched_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = oracle.couple

    def careless(model: Any, inputs: Any) -> Graph:
        graph = real(model, inputs)
        model.bn1.running_mean.add_(1e-3)
        return graph

    monkeypatch.setattr(oracle, "couple", careless)
    with pytest.raises(AssertionError, match="running_mean changed"):
        oracle.check_exact(conv.VGG(), IMAGE)


def test_freezing_everything_is_found() -> None:
    graph = oracle.couple(oracle.settle(conv.VGG()), IMAGE)
    with pytest.raises(AssertionError, match="no group is produced by"):
        oracle.produced_by(replace(graph, groups=()), "conv1")
    assert attributes(graph, {}) == {}


class Casting(torch.nn.Module):
    """A product in float32 whatever the model's type, as routers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 256), torch.nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, weight = self.first(x).relu(), self.last.weight
        return torch.nn.functional.linear(hidden.type(torch.float32), weight.type(torch.float32)).type_as(x)


def test_casts_do_not_round_what_is_compared() -> None:
    model, x = oracle.settle(Casting()), torch.randn(2, 6)
    graph = oracle.couple(model, x)
    keep = {"first": torch.arange(256) % 3 > 0}
    assert verify(model, oracle.cut(model, graph, keep), changes(graph, keep), x).error < 1e-14
