"""Experts of one layer among several: routers of the other layers keep all of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracle import settle
from torch import Tensor, nn

import prunella as pr
from prunella.errors import PruningError
from prunella.graph.cut.changes import Along, changes
from prunella.graph.restricted import Restricted
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify

EXPERT = pr.Recipe(granularity=pr.Expert())
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Mixture(nn.Module):
    """Experts with a router; softmax before the choice (as in Mixtral) or after it."""

    def __init__(self, router: nn.Linear | None = None, *, top: int = 2, first: bool = True) -> None:
        super().__init__()
        self.router, self.top, self.first = router or nn.Linear(6, 4), top, first
        self.up, self.down = nn.Parameter(torch.randn(4, 5, 6)), nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.first:
            weights, index = scores.softmax(-1).topk(self.top, -1)
        else:
            values, index = scores.topk(self.top, -1)
            weights = values.sigmoid() if self.top == 1 else values.softmax(-1)
        inner = torch.relu(torch.einsum("tkoi,ti->tko", self.up[index], x))
        out: Tensor = torch.einsum("tkio,tko,tk->ti", self.down[index], inner, weights)
        return out


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


def experts(plan: pr.Plan) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in plan.keep.items() if not bool(mask.all())}


@pytest.mark.parametrize("first", [True, False], ids=["softmax first", "choice first"])
@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_experts_of_one_layer_alone(layer: int, top: int, first: bool) -> None:
    model = settle(Layers(*(Mixture(top=top, first=first) for _ in range(3))))
    plan = pr.plan(model, X, EXPERT, remove={f"layers.{layer}.router": [1]})
    assert experts(plan) == {f"layers.{layer}.router": [0, 2, 3]}
    small: Any = pr.shrink(model, plan)
    widths = [mixture.router.out_features for mixture in small.layers]
    assert widths == [3 if k == layer else 4 for k in range(3)]
    assert verify(model, small, plan.changes, torch.randn(9, 6, dtype=X.dtype)).exact


@pytest.mark.parametrize("removed", [{0: [1], 1: [1]}, {0: [1], 2: [0, 3]}, {0: [2], 1: [2], 2: [2]}])
def test_experts_of_several_layers(removed: dict[int, list[int]]) -> None:
    model = settle(Layers(*(Mixture() for _ in range(3))))
    plan = pr.plan(model, X, EXPERT, remove={f"layers.{k}.router": units for k, units in removed.items()})
    small: Any = pr.shrink(model, plan)
    assert [4 - len(removed.get(k, [])) for k in range(3)] == [mixture.router.out_features for mixture in small.layers]


def test_layers_with_one_router_lose_the_same_experts() -> None:
    router = nn.Linear(6, 4)
    model = settle(Layers(Mixture(router), Mixture(), Mixture(router)))
    plan = pr.plan(model, X, EXPERT, remove={"layers.0.router": [0]})
    small: Any = pr.shrink(model, plan)
    assert [len(mixture.up) for mixture in small.layers] == [3, 4, 3]


class Slots(nn.Module):
    """Attention over learned slots, of which none may go: their number is typed in, or a sum runs along them."""

    def __init__(self, *, literal: bool) -> None:
        super().__init__()
        self.keys, self.values, self.literal = nn.Linear(6, 4), nn.Linear(4, 6), literal

    def forward(self, x: Tensor) -> Tensor:
        scores = self.keys(x)
        weights = scores.softmax(-1) if self.literal else scores.cumsum(-1).softmax(-1)
        out: Tensor = self.values(weights.reshape(-1, 4) if self.literal else weights)
        return out


@pytest.mark.parametrize("literal", [True, False])
def test_a_softmax_over_positions_that_hang_together_is_still_refused(literal: bool) -> None:
    model = settle(Layers(Mixture(), Slots(literal=literal)))
    with pytest.raises(PruningError, match=r"layers\.1\.keys"):
        pr.plan(model, X, EXPERT, remove={"layers.1.keys": [0]})
    plan = pr.plan(model, X, EXPERT, remove={"layers.0.router": [0]})
    assert experts(plan) == {"layers.0.router": [1, 2, 3]}


class Loop(nn.Module):
    """A router for every step: the number of calls grows with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture, self.head = Mixture(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.stack([self.mixture(step) for step in x.unbind(1)], 1))
        return out


def test_a_loop_over_a_longer_input_is_restricted_in_each_step() -> None:
    model = settle(Loop())
    example = torch.randn(2, 3, 6)
    graph = couple(model, example)
    (group,) = [group.name for group in graph.groups if group.kind == "expert"]
    done = changes(graph, {group: torch.tensor([True, False, True, True])})
    assert {(call.name, call.calls) for call in done.along if call.example == 0} == {("softmax", 3), ("topk", 3)}
    plan = pr.plan(model, example, EXPERT, remove={group: [1]})
    assert verify(model, pr.shrink(model, plan), plan.changes, torch.randn(2, 8, 6)).exact


@pytest.mark.parametrize(("calls", "restricted"), [(1, True), (2, False), (0, True)])
def test_a_call_that_the_example_has_too_is_no_further_call(calls: int, restricted: bool) -> None:
    """The first call is restricted; of the second one, the number of calls tells whether the example had it."""
    scores = torch.zeros(2, 4)
    along = Along("softmax", 0, 1, torch.tensor([0, 2]), calls=calls)
    with Restricted([along]):
        assert scores.softmax(1)[0].tolist() == [0.5, 0, 0.5, 0]
        assert scores.softmax(1)[0].tolist() == ([0.5, 0, 0.5, 0] if restricted else [0.25] * 4)
