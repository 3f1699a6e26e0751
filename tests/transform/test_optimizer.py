"""The optimizer goes on after a cut as if the model had been born small."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

import prunella as pr
from prunella.errors import NotSupported, RequestError
from tests.hand import hand_plan

MAKERS: list[Callable[[list[nn.Parameter]], Optimizer]] = [
    lambda p: Adam(p, lr=0.01),
    lambda p: AdamW(p, lr=0.01, amsgrad=True),
    lambda p: SGD(p, lr=0.01, momentum=0.9),
    lambda p: RMSprop(p, lr=0.01, centered=True),
]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 20), nn.ReLU(),
        nn.Linear(20, 4),
    )  # fmt: skip


def _steps(model: nn.Module, optimizer: Optimizer, count: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(count):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _plan(model: nn.Module) -> pr.Plan:
    return pr.plan(model, torch.zeros(1, 3, 8, 8), pr.Recipe(pr.magnitude), target=pr.Sparsity(0.4))


@pytest.mark.parametrize("make", MAKERS, ids=["adam", "amsgrad", "momentum", "rmsprop"])
def test_the_trajectory_is_that_of_a_model_born_small(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    model = _net()
    optimizer = make(list(model.parameters()))
    _steps(model, optimizer, 5, seed=1)
    plan = _plan(model)
    small = pr.shrink(model, plan)
    # born small: an optimizer that never saw the dense model, whose state is written by hand from the cut positions
    born = copy.deepcopy(small)
    fresh = make(list(born.parameters()))
    for (name, parameter), old in zip(born.named_parameters(), model.parameters(), strict=True):
        state = {}
        for key, value in optimizer.state[old].items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) and value.shape == old.shape:
                for axis, kept in plan.cuts.get(name, {}).items():
                    state[key] = state[key][kept] if axis == 0 else state[key][:, kept]
        fresh.state[parameter] = state
    pr.transform.carry_(optimizer, model, small, plan)
    assert _steps(small, optimizer, 6, seed=2) == _steps(born, fresh, 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), born.parameters(), strict=True))


def test_without_the_moments_the_trajectory_is_another() -> None:
    model = _net()
    optimizer = Adam(model.parameters(), lr=0.01)
    _steps(model, optimizer, 5, seed=1)
    plan = _plan(model)
    small = pr.shrink(model, plan)
    forgetful = copy.deepcopy(small)
    pr.transform.carry_(optimizer, model, small, plan)
    kept = _steps(small, optimizer, 3, seed=2)
    assert kept != _steps(forgetful, Adam(forgetful.parameters(), lr=0.01), 3, seed=2)


def test_factored_moments_are_cut_along_the_axes_that_they_have() -> None:
    model = _net()
    optimizer = Adafactor(model.parameters(), lr=0.01)
    _steps(model, optimizer, 2, seed=1)
    plan = _plan(model)
    small = pr.shrink(model, plan)
    wanted = optimizer.state[model[4].weight]["row_var"][plan.cuts["4.weight"][0]].clone()
    pr.transform.carry_(optimizer, model, small, plan)
    state = optimizer.state[small[4].weight]
    assert torch.equal(state["row_var"], wanted)
    assert state["col_var"].shape == (1, small[4].in_features)
    assert all(torch.isfinite(torch.tensor(_steps(small, optimizer, 2, seed=3))))


def test_groups_keep_their_settings_and_other_models_their_parameters() -> None:
    model, other = _net(), nn.Linear(2, 2)
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [*other.parameters(), model[4].weight]}]
    optimizer = SGD(groups, lr=0.1)
    plan = _plan(model)
    small = pr.shrink(model, plan)
    pr.transform.carry_(optimizer, model, small, plan)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5 and first["params"][0] is small[0].weight
    assert [id(p) for p in second["params"]] == [id(p) for p in (*other.parameters(), small[4].weight)]


def test_the_average_of_the_weights_is_cut_by_the_same_plan() -> None:
    model = _net()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    _steps(model, optimizer, 2, seed=1)
    average.update_parameters(model)
    plan = _plan(model)
    small = pr.shrink(model, plan)
    pr.transform.carry_(optimizer, model, small, plan)
    before = average.module[4].weight.detach().clone()
    average.module = pr.shrink(average.module, plan)
    assert torch.equal(average.module[4].weight, before[plan.cuts["4.weight"][0]][:, plan.cuts["4.weight"][1]])
    _steps(small, optimizer, 1, seed=2)
    average.update_parameters(small)


def test_gradients_are_cut_with_their_parameters() -> None:
    model = _net()
    cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    plan = _plan(model)
    small = pr.shrink(model, plan)
    for name, parameter in small.named_parameters():
        wanted = model.get_parameter(name).grad
        for axis, kept in plan.cuts.get(name, {}).items():
            wanted = wanted.index_select(axis, kept)
        assert torch.equal(parameter.grad, wanted)


def test_what_cannot_be_carried_is_said_before_anything_changes() -> None:
    model = _net()
    plan = _plan(model)
    small = pr.shrink(model, plan)
    with pytest.raises(RequestError, match="no parameter of the dense model"):
        pr.transform.carry_(SGD(nn.Linear(2, 2).parameters(), lr=0.1), model, small, plan)
    with pytest.raises(RequestError, match="has no parameter"):
        pr.transform.carry_(SGD(model.parameters(), lr=0.1), model, nn.Linear(2, 2), hand_plan())
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[model[4].weight] = {"sketch": torch.zeros(7, 7)}
    with pytest.raises(NotSupported, match=r"'sketch' of 4\.weight"):
        pr.transform.carry_(optimizer, model, small, plan)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
