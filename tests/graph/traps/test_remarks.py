"""Frozen, tied, shared and unused parameters are cut or left as they must be, and the plan and `inspect` say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.oracle import check_exact, exact_groups, produced_by, settle
from torch import Tensor, nn

import prunella
from prunella.cli.info import _graph_text, graph_data
from prunella.graph.solve.groups import couple
from prunella.targets import Params


class Mixed(nn.Module):
    """One table read twice under two names, one block used twice, a frozen layer, a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.project = nn.Embedding(9, 12), nn.Linear(12, 8)
        self.block = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))
        self.back, self.head = nn.Linear(8, 12), nn.Linear(12, 9, bias=False)
        self.head.weight = self.table.weight
        self.spare = nn.Linear(8, 6)
        self.project.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.project(self.table(tokens))
        x = x + self.block(x)
        x = x + self.block(x)
        out: Tensor = self.head(self.back(x))
        return out


TOKENS = torch.arange(10).view(2, 5) % 9


def test_each_is_cut_as_it_must_be() -> None:
    model = Mixed()
    checked = check_exact(model, TOKENS)
    small = checked.small
    width = {group.name: int(checked.keep[group.name].sum()) for group in exact_groups(checked.graph)}
    table = next(group for group in exact_groups(checked.graph) if group.size == 12)
    assert {(m.entity, m.axis) for m in table.members} >= {
        ("table.weight", 1),
        ("back.weight", 0),
        ("project.weight", 1),
    }
    assert small.get_parameter("head.weight") is small.get_parameter("table.weight")
    assert small.get_parameter("head.weight").shape == (9, width[table.name])
    inner = produced_by(checked.graph, "block.0")
    assert {(m.entity, m.axis) for m in inner.members} == {
        ("block.0.weight", 0),
        ("block.0.bias", 0),
        ("block.2.weight", 1),
    }
    assert small.get_parameter("block.0.weight").shape[0] == width[inner.name] < 20
    stream = produced_by(checked.graph, "project")
    assert small.get_parameter("project.weight").shape == (width[stream.name], width[table.name])
    assert not small.get_parameter("project.weight").requires_grad
    assert small.get_parameter("spare.weight").shape == (6, 8)


REMARKS = (
    "tied, cut as one: table.weight = head.weight",
    "used several times, cut as one: block.0.weight (2 times), block.2.weight (2 times)",
    "not trained (requires_grad=False), cut like any other: project.weight, project.bias",
    "not used on these inputs, kept dense: spare.weight, spare.bias",
)


def test_the_plan_says_so_and_keeps_it(tmp_path: Path) -> None:
    plan = prunella.plan(settle(Mixed()), TOKENS, target=Params(0.7))
    assert plan.remarks == REMARKS and all(line in str(plan) for line in REMARKS)
    assert prunella.io.load_plan(prunella.io.save_plan(plan, tmp_path / "x.plan")).remarks == REMARKS


def test_inspect_says_so() -> None:
    data = graph_data(couple(settle(Mixed()), TOKENS))
    assert data["tied"] == [["table.weight", "head.weight"]]
    assert data["not_trained"] == ["project.weight", "project.bias"]
    assert data["shared"] == {"block.0.weight": 2, "block.2.weight": 2}
    assert data["unused"] == ["spare.weight", "spare.bias"]
    text = _graph_text(data, None)
    assert all(line in text for line in REMARKS)


def test_inspect_says_of_what_the_units_stay_a_multiple() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(8, 16), nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([2, len(x)], dtype=torch.int32)
            out: Tensor = torch._grouped_mm(self.first(x), self.weight, offs=ends)
            return out

    model = settle(Experts()).bfloat16()
    try:
        graph = couple(model, torch.randn(6, 8).bfloat16())
    except prunella.PruningError:
        pytest.skip("this torch has no grouped_mm here")
    (group,) = graph_data(graph)["groups"]
    assert (group["units"], group["multiple"]) == (16, 8)
    assert "16 (by 8)" in _graph_text(graph_data(graph), None)


def test_nothing_special_is_no_remark() -> None:
    model = settle(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    assert prunella.plan(model, torch.randn(2, 4), target=Params(0.8)).remarks == ()
