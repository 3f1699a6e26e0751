"""A plan of what is zero already removes exactly that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.planning.zeros import _kept, _unchanged
from tests.graphs import Attention, hand_graph, mlp

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)


def test_units_that_nothing_reads_go_and_others_stay() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
        model[0].weight[2] = 0  # still a constant: its bias is read
    plan = pr.planning.plan_zeros(model, X)
    assert {row.name: row.kept for row in plan.rows} == {"0": 4, "2": 5}
    assert plan.got == pytest.approx(2 / 11) and plan.target is None
    small = pr.shrink(model, plan)
    assert torch.allclose(small(X), model(X), atol=1e-6) and small[0].out_features == 4
    assert "by hand" in str(plan)


def test_a_group_that_is_all_zero_keeps_one() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    plan = pr.planning.plan_zeros(model, X)
    assert plan.keep["0"].tolist() == [True] + [False] * 5
    assert torch.allclose(pr.shrink(model, plan)(X), model(X), atol=1e-6)


def test_where_no_weight_reads_a_unit_all_of_it_has_to_be_zero() -> None:
    model, graph = mlp(), hand_graph()
    group = replace(graph.groups[0], members=graph.groups[0].members[:2])
    with torch.no_grad():
        model[0].weight[[3, 4]] = 0
        model[0].bias[3] = 0
    assert _kept(model, graph, group).tolist() == [True, True, True, False, True, True]
    assert _kept(model, graph, replace(group, multiple=4)).tolist() == [True] * 6
    assert _kept(model, graph, replace(group, min_units=6)).tolist() == [True] * 6


class Grown(nn.Module):
    """Its output says how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.a.weight.shape[0]


def test_a_cut_that_changes_the_output_is_not_made() -> None:
    model = Grown()
    with torch.no_grad():
        model.b.weight[:, 2] = 0
    with pytest.raises(NotSupported, match="no unit is exactly zero"):
        pr.planning.plan_zeros(model, X)


def test_a_cut_is_compared_with_the_model_as_it_is() -> None:
    model, keep = mlp(), {"0": torch.arange(6) != 2}
    assert not _unchanged(model, hand_graph(), keep, X)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    assert _unchanged(model, hand_graph(), keep, X)


def test_heads() -> None:
    torch.manual_seed(0)
    model, batch = Attention(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.out.weight[:, 3:6] = 0
    plan = pr.planning.plan_zeros(model, batch, granularity=pr.Head())
    assert plan.rows[0].kept == 3
    assert torch.allclose(pr.shrink(model, plan)(batch), model(batch), atol=1e-6)


def test_masks_of_single_weights() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 1] = model[4].weight[2] = 0
    plan = pr.planning.plan_zeros(model, X, granularity=pr.Element())
    assert [int((~plan.masks[f"{n}.weight"]).sum()) for n in "024"] == [1, 0, 5]
    assert pr.planning.plan_zeros(model, X, granularity=pr.Element(), skip=["4"]).got == pytest.approx(1 / 54)
    pr.finalize(pr.apply_(model, plan))


def test_nothing_is_zero() -> None:
    for unit in (pr.Element(), pr.Channel()):
        with pytest.raises(NotSupported, match="is exactly zero"):
            pr.planning.plan_zeros(mlp(), X, granularity=unit)
    with pytest.raises(RequestError, match="Element"):
        pr.planning.plan_zeros(mlp(), X, granularity=pr.Width())  # type: ignore[arg-type]
