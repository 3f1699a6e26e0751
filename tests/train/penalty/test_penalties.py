"""Penalties by hand, and where they lead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.planning import recipes
from prunella.recovery.finetune import Training
from prunella.train.penalty.penalties import strengths
from tests.graphs import convnet, images, mlp, square_loss
from tests.hand import hand_plan

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)
FAST = Training(optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr), lr_schedule=lambda progress: 1.0)


def unit_rows(model: nn.Module, group: int) -> Tensor:
    """All weights of the units of one group of `mlp`, one row a unit."""
    made, read = model[2 * group], model[2 * group + 2]
    return torch.cat([made.weight, made.bias[:, None], read.weight.T], 1)


def test_slimming_is_the_sum_of_the_scales() -> None:
    model, batch = convnet(), images()[0]
    penalty = pr.train.slimming(pr.train.coupled_units(model, batch))
    with torch.no_grad():
        model[1].weight[0] = -2
    value = penalty(model)
    assert value.item() == pytest.approx(float((model[1].weight.abs().sum() + model[4].weight.abs().sum()).detach()))
    value.backward()
    assert torch.equal(model[1].weight.grad, model[1].weight.sign()) and model[0].weight.grad is None
    one = pr.train.slimming(pr.train.coupled_units(model, batch, only=["3"]))
    assert one(model).item() == pytest.approx(float(model[4].weight.abs().sum().detach()))
    with pytest.raises(NotSupported, match="no scales"):
        pr.train.slimming(pr.train.coupled_units(mlp(), X))


def test_slimming_and_its_recipe() -> None:
    model, data = convnet(), images()
    loss = pr.train.penalized(square_loss, pr.train.slimming(pr.train.coupled_units(model, data[0])), 0.2)
    before = model[1].weight.detach().clone()
    pr.finetune(model, data, loss, steps=40, lr=0.05, training=FAST)
    assert float(model[1].weight.detach().abs().sum()) < float(before.sum()) - 1
    plan = pr.plan(model, data[0], recipes.named("network_slimming"), target=pr.Sparsity(0.5))
    scales = [model[i].weight.detach().abs() for i in (1, 4)]
    edge = torch.cat(scales).sort().values[6]
    assert [row.kept for row in plan.rows] == [int((s > edge).sum()) for s in scales]
    pr.shrink(model, plan)


def test_group_lasso_by_hand() -> None:
    model = mlp()
    penalty = pr.train.group_lasso(pr.train.coupled_units(model, X))
    rows = [unit_rows(model, group) for group in (0, 1)]
    expected = sum(row.shape[1] ** 0.5 * row.norm(dim=1).sum() for row in rows)
    assert penalty(model).item() == pytest.approx(expected.item(), rel=1e-6)
    penalty(model).backward()
    # a weight of the middle layer is pulled by the unit of its row and by the unit of its column
    w, (first, second) = model[2].weight, rows
    expected = w * 10**0.5 * (1 / first.norm(dim=1)[None, :] + 1 / second.norm(dim=1)[:, None])
    assert torch.allclose(w.grad, expected, rtol=1e-5)


def test_group_lasso_has_a_gradient_at_zero() -> None:
    model = mlp()
    penalty = pr.train.group_lasso(pr.train.coupled_units(model, X))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    penalty(model).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in list(model.parameters())[:5])


def test_strengths_of_group_sparsity() -> None:
    assert strengths(torch.tensor([4.0, 0.0, 2.0, 3.0]), 4.0).tolist() == [1, 16, 4, 2]
    assert strengths(torch.ones(3), 4.0).tolist() == [1, 1, 1]
    model = mlp()
    rows = unit_rows(model, 0)
    sums = rows.square().sum(1)
    penalty = pr.train.group_sparsity(pr.train.coupled_units(model, X, only=["0"]), alpha=2.0)
    gamma = strengths(sums.detach(), 2.0)
    assert gamma.max() == 4 and gamma.min() == 1 and gamma.argmax() == sums.argmin()
    assert penalty(model).item() == pytest.approx(float((gamma * sums).sum().detach()), rel=1e-6)
    penalty(model).backward()
    assert torch.allclose(model[0].weight.grad, 2 * gamma[:, None] * model[0].weight)
    assert torch.allclose(model[2].weight.grad, 2 * gamma * model[2].weight)
    with pytest.raises(RequestError, match="alpha"):
        pr.train.group_sparsity(pr.train.coupled_units(model, X), alpha=-1.0)


def test_group_sparsity_makes_the_cut_harmless() -> None:
    model, data = convnet(), images()
    units = pr.train.coupled_units(model, data[0])
    trained = copy.deepcopy(model)
    pr.finetune(model, data, square_loss, steps=60, lr=0.02, training=FAST)
    pr.finetune(trained, data, pr.train.penalized(square_loss, pr.train.group_sparsity(units), 0.1), steps=60, lr=0.02,
                training=FAST)  # fmt: skip
    harm = []
    for net in (model.eval(), trained.eval()):
        small = pr.shrink(net, pr.plan(net, data[0], recipes.named("group_l2"), target=pr.Sparsity(0.4)))
        harm.append(float((small(data[0]) - net(data[0])).detach().norm() / net(data[0]).detach().norm()))
    assert harm[1] < 0.7 * harm[0]


def test_a_penalty_fits_copies_and_refuses_other_models() -> None:
    model = mlp()
    penalty = pr.train.group_lasso(pr.train.coupled_units(model, X))
    replica = copy.deepcopy(model)
    with torch.no_grad():
        replica[2].weight.mul_(2)
    assert penalty(replica) > penalty(model)
    small = pr.shrink(model, pr.plan(model, X, target=pr.Sparsity(0.4)))
    with pytest.raises(RequestError, match="has another size"):
        penalty(small)
    with pytest.raises(RequestError, match="no parameter"):
        penalty(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="strength"):
        pr.train.penalized(square_loss, penalty, -1.0)


# -- growing regularization ------------------------------------------------------------------------------------------


def test_the_penalty_grows_up_to_its_ceiling() -> None:
    model = mlp()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[1] = False
    growing = pr.train.GReg(model, hand_plan(masks={"0.weight": mask}), delta=0.25, every=2, ceiling=0.6)
    seen = []
    for _ in range(6):
        seen.append(growing.strength)
        growing.step()
    assert seen == [0.25, 0.25, 0.5, 0.5, 0.6, 0.6] and growing.done
    assert growing(model).item() == pytest.approx(0.3 * float(model[0].weight[1].detach().square().sum()))
    growing(model).backward()
    assert torch.allclose(model[0].weight.grad, 0.6 * model[0].weight * ~mask) and model[2].weight.grad is None


def test_what_a_plan_removes_has_gone_to_zero_before_it_is_cut() -> None:
    model, data = convnet().eval(), images()
    plan = pr.plan(model, data[0], target=pr.Sparsity(0.4))
    growing = pr.train.GReg(model, plan, delta=0.5, every=5, ceiling=5.0)
    pr.finetune(model, data, pr.train.penalized(square_loss, growing), steps=120, lr=0.05, training=FAST,
                on_step=lambda *_: growing.step())  # fmt: skip
    assert growing.done
    small = pr.shrink(model, plan).eval()
    assert torch.allclose(small(data[0]), model(data[0]), atol=1e-3)


def test_without_a_plan_the_penalty_tells_weights_apart_by_curvature() -> None:
    """`min h (w - 1)^2 / 2 + lambda w^2 / 2` is `h / (h + lambda)`: equal weights part, the flat ones shrink."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    h = torch.tensor([4.0, 1.0, 0.25])
    growing = pr.train.GReg(model, None, delta=0.5, every=1, ceiling=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        ((h * (model.weight - 1).square()).sum() / 2 + growing(model)).backward()
        optimizer.step()
    assert model.weight.tolist()[0] == pytest.approx([4 / 4.5, 1 / 1.5, 0.25 / 0.75], abs=1e-5)


def test_growing_refuses_what_makes_no_sense() -> None:
    with pytest.raises(RequestError, match="removes nothing"):
        pr.train.GReg(mlp(), hand_plan(masks={"0.weight": torch.ones(6, 4, dtype=torch.bool)}))
    with pytest.raises(RequestError, match="delta"):
        pr.train.GReg(mlp(), None, delta=2.0, ceiling=1.0)
