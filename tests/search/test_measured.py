"""Measured allocation: its curves are those of real cuts, and its choice is the best of all."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.search.measured import cosine_distance, distance_of, divergence, every_step


class Net(nn.Module):
    """Two groups: one in front of a norm, one in front of a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu().mean((2, 3))
        return self.d(self.c(x).relu())


def _setting() -> tuple[Net, list[Tensor], list[Tensor], pr.search.Space]:
    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.d.weight.mul_(5)
    fit, judge = ([torch.randn(32, 2, 5, 5, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    recipe = pr.Recipe(criterion=pr.criteria.obs_units)
    return model, fit, judge, pr.search.space(model, fit[0], recipe, data=fit, only=["a", "c"])


def test_curves_are_the_losses_of_real_cuts_with_their_refit() -> None:
    model, fit, judge, space = _setting()
    points: dict[tuple[str, float], float] = {}

    def note(name: str, fraction: float, quality: float) -> None:
        points[name, fraction] = quality

    pr.search.measured(space, pr.Params(0.7), judge, levels=(0.25, 0.5), ridge=1e-10, on_point=note)
    assert set(points) == {("a", 0.25), ("a", 0.5), ("c", 0.25), ("c", 0.5)}
    for (name, fraction), quality in points.items():
        sizes = zip(space.names, space.sizes, strict=True)
        counts = [round(fraction * size) if other == name else 0 for other, size in sizes]
        keep = space.candidates.keep(tuple(counts))
        plan = pr.Plan.of_structure(space.candidates.graph, keep, inputs=fit[0])
        small = pr.shrink(model, plan)
        pr.reconstruct(small, model, fit, plan, ridge=1e-10)
        with torch.no_grad():
            expected = sum(divergence(model(x), small(x)) for x in judge) / len(judge)
        assert -quality == pytest.approx(expected, rel=1e-4)


def test_the_model_is_untouched_bit_for_bit() -> None:
    model, _, judge, space = _setting()
    before = copy.deepcopy(model.state_dict())
    pr.search.measured(space, pr.Params(0.7), judge)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_choice_is_the_best_of_all_within_the_budget() -> None:
    """By enumeration, with losses that add up."""
    _, _, judge, space = _setting()
    losses: dict[str, dict[float, float]] = {name: {0.0: 0.0} for name in space.names}
    levels = (0.25, 0.5, 0.75)
    target = pr.Params(0.7)
    found = pr.search.measured(
        space, target, judge, levels=levels, on_point=lambda name, x, q: losses[name].update({x: -q})
    )
    budget = space.budget(target)
    best = min(
        sum(losses[name][x] for name, x in zip(space.names, choice, strict=True))
        for choice in itertools.product(*(losses[name] for name in space.names))
        if space.cost(target, tuple(round(x * n) for x, n in zip(choice, space.sizes, strict=True))) <= budget
    )
    assert found.cost <= budget and -found.value <= best + 1e-12


def test_a_plan_takes_the_allocation() -> None:
    model, fit, judge, space = _setting()
    found = pr.search.measured(space, pr.MACs(0.6), judge)
    recipe = pr.Recipe(criterion=pr.criteria.obs_units, allocation=found.allocation)
    plan = pr.plan(model, fit[0], recipe, data=fit, target=pr.MACs(0.6), only=["a", "c"])
    assert plan.got <= 0.6


def test_steps_between_the_levels_are_monotone_and_log_linear() -> None:
    curve = dict(every_step([(0.25, 1e-4), (0.75, 1e-2)], range(17), 16))
    assert curve[0.25] == pytest.approx(-1e-4) and curve[0.75] == pytest.approx(-1e-2)
    assert curve[0.5] == pytest.approx(-1e-3) and curve[0.125] == pytest.approx(-5e-5)
    assert curve[1.0] == pytest.approx(-1e-1)
    dips = dict(every_step([(0.25, 1e-2), (0.75, 1e-4)], range(17), 16))
    assert dips[0.75] == pytest.approx(-1e-2)


def test_distances_are_zero_for_equal_outputs() -> None:
    x, y = torch.randn(2, 4, 7)
    assert divergence(x, x) == pytest.approx(0, abs=1e-12) and cosine_distance(x, 3 * x) == pytest.approx(0, abs=1e-12)
    expected = nn.functional.kl_div(y.log_softmax(1), x.log_softmax(1), log_target=True, reduction="batchmean")
    assert divergence(x, y) == pytest.approx(float(expected), rel=1e-5)


def test_the_divergence_at_a_temperature_is_the_loss_of_the_distillation() -> None:
    x, y = torch.randn(2, 4, 7)
    dense, pruned = nn.Linear(7, 7), nn.Linear(7, 7)
    with torch.no_grad():
        expected = pr.recovery.distill_logits(dense, temperature=2.0)(pruned, x)
        assert divergence(dense(x), pruned(x), 2.0) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(x, y, 1.0) == divergence(x, y) != pytest.approx(divergence(x, y, 2.0), rel=0.01)


@pytest.mark.parametrize("wrong", [{"levels": (0.5, 1.0)}, {"levels": ()}, {"ridge": 0.0}])
def test_wrong_requests(wrong: dict[str, Any]) -> None:
    _, _, judge, space = _setting()
    with pytest.raises(RequestError):
        pr.search.measured(space, pr.Params(0.7), judge, **wrong)


def test_a_space_of_weights_or_without_data_is_refused() -> None:
    model, fit, judge, _ = _setting()
    for space in (
        pr.search.space(model, fit[0], pr.Recipe(granularity=pr.Element())),
        pr.search.space(model, fit[0], pr.Recipe()),
    ):
        with pytest.raises(RequestError, match="units and data"):
            pr.search.measured(space, pr.Params(0.7), judge)


def test_vectors_of_length_one_are_embeddings() -> None:
    x = torch.randn(6, 4)
    assert distance_of(x) is divergence and distance_of(nn.functional.normalize(x)) is cosine_distance
    assert distance_of(x[:, :1]) is cosine_distance and distance_of(torch.randn(2, 3, 4)) is cosine_distance
