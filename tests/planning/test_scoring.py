"""From a criterion to scores: the scope of a unit, the level of a criterion, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.granularity import reduce_to_units
from prunella.graph.data import Layer
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.planning.scoring import Scorer
from prunella.registry.criterion import criterion
from prunella.registry.method import REGISTRY
from prunella.stats import Source, Statistics, Subject, collect
from tests.graphs import hand_graph, mlp, square_loss


def scorer(criterion: object, *, seed: int = 0) -> Scorer:
    model, graph = mlp(), hand_graph()
    subject = Subject(model, graph, groups=graph.groups)
    return Scorer(criterion, subject, Statistics(), seed)  # type: ignore[arg-type]


def test_a_filter_scores_the_sum_over_its_rows() -> None:
    weight = mlp()[0].weight.detach().double()
    score = scorer(pr.magnitude)
    group = score.subject.groups[0]
    assert torch.allclose(score.units(group, pr.granularity.Reduce.SUM), weight.abs().sum(1))
    assert torch.allclose(score.units(group, pr.granularity.Reduce.MEAN), weight.abs().mean(1))
    assert torch.allclose(score.units(group, pr.granularity.Reduce.MAX), weight.abs().amax(1))


def test_group_norm_takes_producer_bias_and_readers() -> None:
    model = mlp().double()
    score = scorer(partial(pr.criteria.group_norm, normalize=False))
    parts = [model[0].weight, model[0].bias.unsqueeze(1), model[2].weight.t()]
    expected = torch.cat(parts, 1).norm(dim=1).float()  # type: ignore[arg-type]
    assert torch.allclose(score.units(score.subject.groups[0], pr.granularity.Reduce.SUM).float(), expected)


class TwoNorms(nn.Module):
    """Two normalizations act on each unit, and a grouped convolution gives each unit two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.first(self.a(x)) + self.second(self.b(x))).sum((2, 3))
        assert isinstance(out, Tensor)
        return out


def test_the_scale_of_a_unit_is_the_mean_over_all_that_act_on_it() -> None:
    torch.manual_seed(0)
    model = TwoNorms()
    for norm in (model.first, model.second):
        nn.init.uniform_(norm.weight, -1, 1)
    graph = couple(model, torch.randn(2, 3, 4, 4))
    (group,) = (g for g in graph.groups if any(m.role == "scale" for m in g.members))
    score = Scorer(pr.criteria.bn_scale, Subject(model, graph, groups=(group,)), Statistics())
    scales = (model.first.weight.abs() + model.second.weight.abs()).detach().double() / 2
    assert group.size == 4
    assert torch.allclose(score.units(group, pr.granularity.Reduce.SUM), (scales[:4] + scales[4:]) / 2)


def test_weights_of_a_unit_with_several_positions_are_gathered() -> None:
    torch.manual_seed(0)
    model = TwoNorms()
    graph = couple(model, torch.randn(2, 3, 4, 4))
    (group,) = (g for g in graph.groups if any(m.role == "scale" for m in g.members))
    score = Scorer(
        partial(pr.criteria.group_norm, p=1, normalize=False), Subject(model, graph, groups=(group,)), Statistics()
    )
    per_channel = torch.zeros(8, dtype=torch.float64)
    for layer, norm in ((model.a, model.first), (model.b, model.second)):
        for values in (layer.weight.flatten(1).abs().sum(1), layer.bias.abs(), norm.weight.abs(), norm.bias.abs()):  # type: ignore[union-attr]
            per_channel += values.detach().double()
    readers = model.last.weight.detach().double().abs().sum((0, 2, 3))
    assert torch.allclose(
        score.units(group, pr.granularity.Reduce.SUM), per_channel[:4] + per_channel[4:] + readers, rtol=1e-6
    )


def test_a_unit_may_own_several_positions() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    unit = torch.tensor([1, 0, 1, 0])
    assert reduce_to_units([(values, unit)], 2, pr.granularity.Reduce.SUM).tolist() == [22, 14]
    assert reduce_to_units([(values, unit), (values[:2, :1], unit[:2])], 2, pr.granularity.Reduce.MEAN).tolist() == [
        5,
        3,
    ]
    assert reduce_to_units([(values, unit)], 2, pr.granularity.Reduce.MAX).tolist() == [8, 6]


def test_columns_of_a_convolution_are_summed_by_input_channel() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3))

    @criterion(source="test", scope="consumer")
    def readers(weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()

    try:
        graph = couple(model, torch.randn(1, 3, 6, 6))
        score = Scorer(readers, Subject(model, graph, groups=graph.groups), Statistics())
        found = score.units(graph.group("0"), pr.granularity.Reduce.SUM)
    finally:
        del REGISTRY["readers"]
    assert torch.allclose(found, model[2].weight.detach().double().abs().sum((0, 2, 3)))


def test_taylor_of_a_unit_is_not_taylor_sq() -> None:
    model, graph = mlp(), hand_graph()
    data = [torch.randn(6, 4) for _ in range(3)]
    subject = Subject(model, graph, groups=graph.groups)
    with untouched(model, 0):
        statistics = collect(subject, ["gate_grad", "grad_sq"], Source(data, square_loss))
    joint = Scorer(pr.taylor, subject, statistics).units(graph.groups[0], pr.granularity.Reduce.SUM)
    each = Scorer(pr.criteria.taylor_sq, subject, statistics).units(graph.groups[0], pr.granularity.Reduce.SUM)
    reads = torch.stack(
        [torch.autograd.grad(square_loss(model, x), model[2].weight)[0] * model[2].weight for x in data]
    )
    assert torch.allclose(joint, reads.sum(1).square().mean(0).double(), rtol=1e-4)
    assert not torch.allclose(joint, each, rtol=0.05)


def test_noise_does_not_depend_on_which_groups_take_part() -> None:
    one, two = scorer(pr.criteria.random, seed=1), scorer(pr.criteria.random, seed=2)
    group = one.subject.groups[1]
    alone = Scorer(pr.criteria.random, Subject(one.subject.model, one.subject.graph, groups=(group,)), Statistics(), 1)
    assert one.units(group, pr.granularity.Reduce.SUM).equal(alone.units(group, pr.granularity.Reduce.SUM))
    assert not one.units(group, pr.granularity.Reduce.SUM).equal(two.units(group, pr.granularity.Reduce.SUM))


# -- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (pr.criteria.group_norm, "group_norm scores units, not single weights"),
        (pr.criteria.geometric_median, "geometric_median gives shape"),
        (lambda weight: weight.sum(), "gives shape"),
    ],
)
def test_a_finer_granularity_than_the_criterion_is_refused(criterion: object, message: str) -> None:
    score = scorer(criterion)
    with pytest.raises(pr.PruningError, match=message):
        score.weights(score.subject.graph.layers[0])


def test_numbers_per_unit_and_per_weight_do_not_mix() -> None:
    def mixed(weight: torch.Tensor, gate_grad: torch.Tensor) -> torch.Tensor:
        return weight * gate_grad.sum()

    score = scorer(mixed)
    with pytest.raises(pr.PruningError, match="per unit and per weight together"):
        score.units(score.subject.groups[0], pr.granularity.Reduce.SUM)


def test_scores_that_are_not_finite_are_named() -> None:
    score = scorer(lambda weight: weight / 0)
    with pytest.raises(pr.PruningError, match="scores for 0 that are not finite"):
        score.units(score.subject.groups[0], pr.granularity.Reduce.SUM)


def test_layers_are_found_by_entity() -> None:
    graph = hand_graph()
    twice = Layer("again", "0.weight", 0, 1, 1, "linear")
    subject = Subject(mlp(), type(graph)(graph.entities, (), (), (*graph.layers, twice), (), {}))
    assert subject.layer_of["0.weight"].name == "0"
