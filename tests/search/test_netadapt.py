"""NetAdapt: every step gives what it must, the best proposal wins, and a killed search goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.search import Space, amc_reward, netadapt, space
from prunella.search.netadapt import _smallest
from tests.graphs import convnet, images, square_loss
from tests.stopping import stops_at, tick

DATA = images()


def cuts() -> Space:
    return space(convnet().eval(), DATA[0], pr.Recipe())


def quality(model: nn.Module) -> float:
    tick()
    with torch.no_grad():
        return -float(sum(square_loss(model, batch) for batch in DATA))


@pytest.mark.parametrize("step", [0.05, 0.2])
def test_every_step_reduces_by_at_least_its_part_and_the_budget_is_met(step: float) -> None:
    whole, seen = cuts(), list[float]()
    dense, budget = whole.cost(pr.MACs(1), (0, 0)), whole.budget(pr.MACs(0.3))

    def macs_of(model: nn.Module) -> float:
        first, second, last = (model.get_submodule(name).weight for name in ("0", "3", "7"))
        return 2.0 * (first.numel() * 36 + second.numel() * 9 + last.numel())

    def watched(model: nn.Module) -> float:
        seen.append(macs_of(model))
        return quality(model)

    assert macs_of(whole.model) == dense
    found = netadapt(whole, pr.MACs(0.3), watched, step=step)
    assert found.cost <= budget and found.model is not None and macs_of(found.model) == found.cost
    assert found.tried == len(seen)
    spent = dense
    while seen:  # of every round the proposals; each gives at least the step, or what is left of it
        wanted = max(budget, spent - step * dense)
        proposals = [seen.pop(0)]
        while seen and len(proposals) < 2 and abs(seen[0] - wanted) < dense and seen[0] <= wanted:
            proposals.append(seen.pop(0))
        assert all(cost <= wanted * (1 + 1e-12) for cost in proposals)
        following = [cost for cost in proposals if not seen or seen[0] < cost]
        spent = max(following) if following else min(proposals)


def test_a_proposal_takes_the_fewest_units_that_are_enough() -> None:
    whole = cuts()
    cost = lambda counts: whole.cost(pr.MACs(1), counts)  # noqa: E731
    wanted = 0.7 * cost((0, 0))
    for index in range(2):
        found = _smallest(whole, (0, 0), index, wanted, cost)
        fewest = next((n for n in whole.levels(index) if cost((n, 0) if index == 0 else (0, n)) <= wanted), None)
        assert (found[index] if found else None) == fewest


def test_the_best_proposal_wins_and_not_the_first() -> None:
    whole = cuts()
    for name, module in (("0", "3"), ("3", "0")):  # prefer models whose other layer is whole
        found = netadapt(whole, pr.MACs(0.75), lambda m, module=module: float(m.get_submodule(module).weight.shape[0]))
        assert found.shares[name] > 0 and found.shares[module] == 0


def test_winners_keep_their_tuned_weights() -> None:
    found = netadapt(cuts(), pr.MACs(0.6), quality, step=0.2, tune=lambda m: m[7].bias.data.add_(1))
    assert found.model is not None
    rounds = (found.model[7].bias - convnet()[7].bias).mean().item()
    assert rounds == pytest.approx(round(rounds), abs=1e-5) and rounds >= 2


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    def tune(model: nn.Module) -> None:
        pr.finetune(model, DATA, square_loss, steps=2, lr=1e-3)

    whole = netadapt(cuts(), pr.MACs(0.5), quality, step=0.1, tune=tune)
    with stops_at(5):
        netadapt(cuts(), pr.MACs(0.5), quality, step=0.1, tune=tune, folder=tmp_path)
    again = netadapt(cuts(), pr.MACs(0.5), quality, step=0.1, tune=tune, folder=tmp_path)
    assert (again.shares, again.value, again.tried) == (whole.shares, whole.value, whole.tried - 4)
    assert whole.model is not None and again.model is not None
    states = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in states)


def test_a_quality_is_recorded_with_the_path_to_it(tmp_path: Path) -> None:
    for first in (0, 1):  # other predictions make another group win, after which the same cut leaves another model
        found = netadapt(
            cuts(), pr.Latency(8.0), quality, step=0.2, folder=tmp_path,
            predict=lambda counts, first=first: 20.0 - 2 * counts[first] - counts[1 - first],
        )  # fmt: skip
        assert found.model is not None and quality(found.model) == pytest.approx(found.value, rel=1e-6)


def test_a_predicted_latency_is_a_budget() -> None:
    def table(counts: tuple[int, ...]) -> float:
        return 20.0 - counts[0] - 2 * counts[1]

    found = netadapt(cuts(), pr.Latency(12.0), quality, step=0.1, predict=table)
    assert found.cost <= 12 and table(cuts().removed(found.shares)) == found.cost


def test_what_cannot_be_met_is_missed() -> None:
    with pytest.raises(pr.PruningError, match="no group alone can bring it"):
        netadapt(cuts(), pr.MACs(0.08), quality, step=0.95)
    with pytest.raises(pr.PruningError, match="would remove nothing"):
        netadapt(cuts(), pr.MACs(1e12), quality)
    with pytest.raises(pr.PruningError, match="0 < step < 1"):
        netadapt(cuts(), pr.MACs(0.5), quality, step=2)


def test_the_result_is_an_allocation_for_a_plan() -> None:
    found = netadapt(cuts(), pr.MACs(0.5), quality)
    plan = pr.plan(convnet().eval(), DATA[0], pr.Recipe(allocation=found.allocation), target=pr.MACs(0.5))
    assert plan.after.macs <= 0.5 * plan.before.macs


def test_amc_reward_by_hand() -> None:
    assert amc_reward(0.1, 1e6) == pytest.approx(-1.3815510557964273)
    assert amc_reward(0.1, 1e6) < amc_reward(0.1, 1e5) < amc_reward(0.05, 1e6)  # accuracy first
    with pytest.raises(pr.PruningError):
        amc_reward(0.1, 0.5)
