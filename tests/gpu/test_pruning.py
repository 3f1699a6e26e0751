"""Plan, cut, mask, train, solve and recover on the GPU: what the CPU decides and computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from tests.devices.test_methods import RECOVERIES
from tests.gpu.nets import NETS, close, placed
from tests.graphs import square_loss
from tests.laws.test_composition import IMAGE, tiny
from tests.laws.test_methods import DATA

CPU = torch.device("cpu")
CRITERIA = (pr.magnitude, pr.taylor, pr.wanda, pr.criteria.activation_norm, pr.criteria.random)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.__name__)
def test_a_plan_is_that_of_the_cpu_and_its_cut_computes_the_same(gpu: torch.device, net: str, criterion: Any) -> None:
    outputs = []
    for device in (CPU, gpu):
        model, data = placed(net, device)
        recipe = pr.Recipe(criterion=criterion)
        plan = pr.plan(model, data[0], recipe, target=pr.Params(0.6), data=data, loss=square_loss)
        small = pr.shrink(model, plan)
        assert {p.device.type for p in small.parameters()} == {device.type}
        outputs.append((dict(plan.keep), small(data[0]).detach().cpu()))
    (keep, here), (other, there) = outputs
    assert keep.keys() == other.keys() and all(mask.equal(other[name]) for name, mask in keep.items())
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("granularity", [pr.Element(), pr.NM(2, 4), pr.Block(2, 2)], ids=str)
def test_masks_are_held_in_training(gpu: torch.device, granularity: Any) -> None:
    model, data = placed("transformer", gpu)
    target = None if isinstance(granularity, pr.NM) else pr.Sparsity(0.5)
    skip = ["head"]
    pr.apply_(model, pr.plan(model, data[0], pr.Recipe(granularity=granularity), target=target, skip=skip))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = pr.Pruner(model, optimizer)
    zeros = {name: model.get_parameter(name) == 0 for name in pr.masks_of(model)}
    for batch in data:
        optimizer.zero_grad()
        square_loss(model, batch).backward()
        optimizer.step()
        pruner.step()
    assert zeros and all(bool((model.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())
    assert all(p.device.type == gpu.type for p in model.parameters())


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_end_as_on_the_cpu(gpu: torch.device, name: str) -> None:
    states = []
    for device in (CPU, gpu):
        dense, data = tiny().to(device), [x.to(device) for x in DATA]
        plan = pr.plan(dense, torch.zeros(IMAGE, device=device), target=pr.Params(0.5), data=data)
        small = pr.shrink(copy.deepcopy(dense), plan)
        RECOVERIES[name](small, dense, plan, data)
        states.append(dict(small.state_dict()))
    close(*states, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
def test_layers_are_solved_as_well_as_on_the_cpu(gpu: torch.device, method: str) -> None:
    errors = []
    for device in (CPU, gpu):
        model, data = placed("transformer", device)
        how = pr.llm.OneShot(pr.NM(2, 4), method=getattr(pr.solvers, method))
        done = pr.llm.solve_(model, data[0], how, data=data)
        errors.append([fit.error for fit in done.fits if not fit.skipped])
        for block in model.blocks:  # type: ignore[union-attr]
            zeros = (block.up.weight == 0).reshape(-1, 4).sum(1)
            assert bool((zeros >= 2).all())
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_bfloat16_with_norms_in_float32_and_autocast(gpu: torch.device) -> None:
    model, data = placed("transformer", gpu)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    data = [x.to(torch.bfloat16) for x in data]
    pr.llm.solve_(model, data[0], pr.llm.OneShot(pr.NM(2, 4)), data=data)
    assert bool(torch.isfinite(model(data[0])).all())
    other, more = placed("transformer", gpu)
    with torch.autocast(gpu.type, torch.bfloat16):
        pr.llm.solve_(other, more[0], pr.llm.OneShot(pr.NM(2, 4)), data=more)
        assert bool(torch.isfinite(other(more[0])).all())


def test_the_default_call_works_there(gpu: torch.device) -> None:
    model, data = placed("convolutions", gpu)
    done = pr.prune(model, data[0], target=pr.MACs(0.6), data=[*data] * 4, recover={"steps": 2})
    assert {p.device.type for p in done.model.parameters()} == {gpu.type}
    assert bool(torch.isfinite(done.model(data[0])).all())


def test_two_runs_are_the_same(gpu: torch.device) -> None:
    def once() -> tuple[dict[str, Any], dict[str, Any]]:
        model, data = placed("convolutions", gpu)
        plan = pr.plan(
            model, data[0], pr.Recipe(criterion=pr.taylor), target=pr.Params(0.5), data=data, loss=square_loss
        )
        return dict(plan.keep), dict(pr.shrink(model, plan).state_dict())

    (keep, state), (other_keep, other) = once(), once()
    assert all(mask.equal(other_keep[name]) for name, mask in keep.items())
    assert all(value.equal(other[name]) for name, value in state.items())


def test_random_numbers_of_the_device_are_left_as_they_were(real: torch.device) -> None:
    model, data = placed("convolutions", real)
    before = torch.cuda.get_rng_state(real)
    pr.plan(model, data[0], pr.Recipe(criterion=pr.criteria.random), target=pr.Params(0.5))
    assert torch.cuda.get_rng_state(real).equal(before)
