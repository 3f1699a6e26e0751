"""Linear mode connectivity against curves that are known, and copies that differ by data order only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.io.nested import equal
from prunella.lottery.session import snapshot
from prunella.model.masks import masks_of
from tests.lottery.nets import batch, data, loss_of, net, spec


def scalar(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor([[value]], dtype=torch.float64)}


def line() -> nn.Linear:
    return nn.Linear(1, 1, bias=False, dtype=torch.float64)


def test_there_is_no_barrier_between_a_network_and_itself() -> None:
    model = net()
    state = snapshot(model)
    found = pr.lottery.barrier(net(1), state, copy.deepcopy(state), loss_of)
    assert found.height == 0 and len(set(found.errors)) == 1


def test_the_barrier_of_a_double_well() -> None:
    well = lambda model: float((model.weight**2 - 1) ** 2)  # noqa: E731
    found = pr.lottery.barrier(line(), scalar(1), scalar(-1), well, points=5)
    assert found.positions == (0, 0.25, 0.5, 0.75, 1)
    assert found.errors == pytest.approx([0, 0.5625, 1, 0.5625, 0]) and found.height == pytest.approx(1)


def test_the_barrier_is_above_the_mean_of_the_ends() -> None:
    slope = lambda model: float(model.weight)  # noqa: E731
    found = pr.lottery.barrier(line(), scalar(3), scalar(1), slope)
    assert found.errors[0] == 1 and found.errors[-1] == 3  # position 1 is the first network
    assert found.height == pytest.approx(1)  # the worst end, less the mean of both


def test_the_model_stays_as_it_was() -> None:
    model = net(4)
    before = snapshot(model)
    pr.lottery.barrier(model, snapshot(net(1)), snapshot(net(2)), loss_of, points=3)
    assert equal(snapshot(model), before) and model.training


def test_batch_normalization_may_be_measured_anew() -> None:
    first, second, x = snapshot(net(1)), snapshot(net(2)), data().tensors[0]
    seen = []

    def error(model: nn.Module) -> float:
        assert isinstance(model, nn.Sequential) and isinstance(model[1], nn.BatchNorm1d)
        assert model[1].running_mean is not None and not model.training
        seen.append((model[1].running_mean - model[0](x).mean(0)).abs().max().item())
        return 0.0

    pr.lottery.barrier(net(), first, second, error, points=3, data=[x])
    pr.lottery.barrier(net(), first, second, error, points=3)
    assert max(seen[:3]) < 1e-5 < min(seen[3:])


def test_instability_branches_at_step_k_and_differs_by_data_order_only() -> None:
    model = net()
    early = pr.lottery.instability(model, spec(), loss_of, step=0, seeds=(1, 2), points=5)
    assert len(early.errors) == 5 and early.errors[0] != early.errors[-1]
    assert early == pr.lottery.instability(model, spec(), loss_of, step=0, seeds=(1, 2), points=5)
    assert equal(snapshot(model), snapshot(net()))
    late = pr.lottery.instability(model, spec(), loss_of, step=13, seeds=(1, 2), points=5)
    assert abs(late.errors[0] - late.errors[-1]) < abs(early.errors[0] - early.errors[-1])
    with pytest.raises(pr.PruningError, match="same weights"):
        pr.lottery.instability(model, spec(), loss_of, step=3, seeds=(2, 2))


def test_instability_of_a_ticket_keeps_its_mask() -> None:
    model = net()
    pr.apply_(model, pr.lottery.imp(batch(), rate=0.5)(model, 1))
    zeros = []

    def error(one: nn.Module) -> float:
        zeros.append(int((one.get_parameter("0.weight") == 0).sum()))
        return loss_of(one)

    pr.lottery.instability(model, spec(), error, points=3)
    assert set(zeros) == {int((~masks_of(model)["0.weight"]).sum())}


def test_what_makes_no_sense_is_refused() -> None:
    state = snapshot(net())
    with pytest.raises(pr.PruningError, match="2 points"):
        pr.lottery.barrier(net(), state, state, loss_of, points=2)
    with pytest.raises(pr.PruningError, match="not of this model"):
        pr.lottery.barrier(net(), scalar(1), state, loss_of)
    with pytest.raises(pr.PruningError, match="branch at step 99"):
        pr.lottery.instability(net(), spec(), loss_of, step=99)
