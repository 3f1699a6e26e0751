"""Proximal operators in closed form, and training that ends with units which are exactly zero and exactly removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.train.penalty.units import CoupledUnits
from tests.graphs import Attention, convnet, images, mlp, square_loss

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)


def test_soft_by_hand_and_its_optimality() -> None:
    w = torch.tensor([2.0, -0.5, 0.3, -1.0], dtype=torch.float64)
    assert pr.train.soft_threshold(w, 0.5).tolist() == [1.5, 0, 0, -0.5]
    v = pr.train.soft_threshold(w, 0.4)
    residual = torch.where(v != 0, v - w + 0.4 * v.sign(), ((w - v).abs() - 0.4).clamp_min(0))
    assert float(residual.abs().max()) <= 2.3e-16


def test_group_soft_by_hand_and_its_optimality() -> None:
    w = torch.tensor([[3.0, 4.0, 0, 0], [0.3, 0.4, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert pr.train.group_soft_threshold(w, 0.5).tolist() == [[2.4000000000000004, 3.2, 0, 0], [0] * 4, [0] * 4]
    groups = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = pr.train.group_soft_threshold(groups, 0.8)
    norms, radius = groups.norm(dim=1), 1.6
    assert (v.abs().sum(1) == 0).equal(norms <= radius) and 0 < int((norms <= radius).sum()) < 50
    alive = norms > radius
    residual = v[alive] - groups[alive] + radius * v[alive] / v[alive].norm(dim=1, keepdim=True)
    assert float(residual.abs().max()) < 1e-15


def test_a_group_on_the_border_is_zero() -> None:
    assert torch.count_nonzero(pr.train.group_soft_threshold(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), 2.5)) == 0


def test_sparse_group_soft_minimizes_its_objective() -> None:
    w = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2

    def objective(v: Tensor) -> Tensor:
        return (v - w).square().sum() / 2 + 0.3 * v.abs().sum() + 0.4 * 5**0.5 * v.norm()

    best = pr.train.sparse_group_soft_threshold(w, 0.3, 0.4)
    around = torch.randn(2000, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.05
    assert all(objective(best) <= objective(best + step) for step in around)
    other = pr.train.soft_threshold(pr.train.group_soft_threshold(w, 0.4), 0.3)
    assert objective(best) < objective(other) - 1e-6


def lasso(exact: bool) -> Tensor:
    """Descend `|w - a|^2 / 2 + 0.5 |w|_1` by subgradients, or by proximal steps."""
    a = torch.tensor([3.0, 0.2, -0.4, -2.0])
    w = torch.tensor([0.7, 0.31, -0.77, 0.123])
    for _ in range(400):
        w = pr.train.soft_threshold(w - 0.1 * (w - a), 0.05) if exact else w - 0.1 * (w - a + 0.5 * w.sign())
    return w


def test_a_subgradient_never_makes_exact_zeros() -> None:
    assert torch.count_nonzero(lasso(exact=False)) == 4
    assert lasso(exact=True)[1:3].tolist() == [0, 0]
    assert torch.allclose(lasso(exact=True)[[0, 3]], torch.tensor([2.5, -1.5]), atol=1e-4)


def test_the_weights_of_a_coupled_unit() -> None:
    model = mlp()
    units = pr.train.coupled_units(model, X)
    named = units.named(model)
    first, second = units.groups
    assert [g.weights.tolist() for g in units.groups] == [[4 + 1 + 5] * 6, [6 + 1 + 3] * 5]
    expected = model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)
    assert torch.allclose(first.squares(named), expected)
    expected = model[2].weight.square().sum(1) + model[2].bias.square() + model[4].weight.square().sum(0)
    assert torch.allclose(second.squares(named), expected)
    before = copy.deepcopy(model)
    first.scale_(named, torch.tensor([0.0, 1, 2, 1, 1, 1]))
    assert torch.equal(model[0].weight[2], 2 * before[0].weight[2]) and torch.equal(model[0].bias[1], before[0].bias[1])
    assert torch.count_nonzero(model[0].weight[0]) + torch.count_nonzero(model[2].weight[:, 0]) + model[0].bias[0] == 0
    assert torch.equal(model[4].weight, before[4].weight)


def test_the_weights_of_a_head() -> None:
    torch.manual_seed(0)
    model = Attention()
    (heads,) = pr.train.coupled_units(model, torch.randn(2, 5, 8), granularity=pr.Head()).groups
    made = [model.query, model.key, model.value]
    rows = [torch.cat([x.weight, x.bias[:, None]], 1).unflatten(0, (4, 3)).flatten(1) for x in made]
    rows.append(model.out.weight.T.unflatten(0, (4, 3)).flatten(1))
    assert torch.allclose(heads.squares(dict(model.named_parameters())), torch.cat(rows, 1).square().sum(1))
    assert heads.weights.tolist() == [3 * 27 + 24] * 4


def test_units_of_a_convolution_hold_its_normalization() -> None:
    units = pr.train.coupled_units(convnet(), images()[0])
    first = next(group for group in units.groups if group.name == "0")
    assert {(s.name, s.axis) for s in first.slices} == {
        ("0.weight", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("3.weight", 1),
    }
    assert first.weights.tolist() == [27 + 2 + 54] * 8


def test_one_step_is_the_operator_with_the_learning_rate() -> None:
    model = mlp()
    units = pr.train.coupled_units(model, X, only=["0"])
    expected = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with pr.train.Proximal(model, optimizer, units, group=0.5):
        optimizer.step()
    got = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1)
    assert torch.allclose(got, pr.train.group_soft_threshold(expected, 0.1), atol=1e-7)
    assert not torch.equal(got, expected)
    frozen = copy.deepcopy(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), frozen.parameters(), strict=True))


def test_l1_on_single_weights() -> None:
    model = mlp()
    units, before = pr.train.coupled_units(model, X, skip=["4"]), copy.deepcopy(model)
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1},
                                 {"params": [*model[2].parameters(), *model[4].parameters()]}], lr=0.01)  # fmt: skip
    with pr.train.Proximal(model, optimizer, units, l1=1.0):
        optimizer.step()
    assert torch.equal(model[0].weight, pr.train.soft_threshold(before[0].weight, 0.1))
    assert torch.equal(model[2].weight, pr.train.soft_threshold(before[2].weight, 0.01))
    assert torch.equal(model[4].weight, before[4].weight) and torch.equal(model[0].bias, before[0].bias)


def shrunk_is_trained(model: nn.Module, batch: Tensor) -> pr.Plan:
    plan = pr.planning.plan_zeros(model, batch)
    small = pr.shrink(model, plan)
    model.eval(), small.eval()
    assert torch.allclose(model(batch), small(batch), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params < plan.before.params
    return plan


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        square_loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_proximal_training_ends_in_a_smaller_net_that_is_the_trained_one(l1: float) -> None:
    model, batch = convnet(), images()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with pr.train.Proximal(model, optimizer, pr.train.coupled_units(model, batch), group=0.15, l1=l1):
        train(model, optimizer, batch, 60)
    plan = shrunk_is_trained(model, batch)
    assert 0 < plan.got < 1


def test_heads_become_zero_as_a_whole() -> None:
    torch.manual_seed(0)
    model, batch = Attention(), torch.randn(2, 5, 8)
    units = pr.train.coupled_units(model, batch, granularity=pr.Head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pr.train.Proximal(model, optimizer, units, group=0.15):
        train(model, optimizer, batch, 30)
    plan = shrunk_is_trained(model, batch)
    assert {row.kind for row in plan.rows} == {"head"} and 0 < plan.rows[0].kept < 4


def test_half_space_training_ends_in_a_smaller_net_that_is_the_trained_one() -> None:
    model, batch = convnet(), images()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pr.train.HalfSpace(
        model, optimizer, pr.train.coupled_units(model, batch), strength=4.0, epsilon=0.5, start=20
    ):
        train(model, optimizer, batch, 20)
        with pytest.raises(pr.PruningError, match="no unit is exactly zero"):
            pr.planning.plan_zeros(model, batch)
        train(model, optimizer, batch, 60)
        zeros = (model[0].weight.flatten(1).norm(dim=1) == 0).nonzero()
        train(model, optimizer, batch, 5)
    assert len(zeros) and torch.count_nonzero(model[0].weight[zeros.flatten()]) == 0
    assert 0 < shrunk_is_trained(model, batch).got < 1


def plane(units: CoupledUnits, model: nn.Module, steps: list[float], epsilon: float, start: int = 0) -> Tensor:
    """One half-space step after an optimizer that multiplies unit i by `steps[i]`."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    first = units.groups[0]
    norms = first.squares(units.named(model)).sqrt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pr.train.HalfSpace(model, optimizer, units, strength=0.1, epsilon=epsilon, start=start):
        named = units.named(model)
        for name, factor in first.factors(named, 1 - torch.tensor(steps)):
            named[name].grad = named[name].detach() * factor
        optimizer.step()
    return first.squares(units.named(model)).sqrt().detach() / norms.detach()


def test_a_half_space_step_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 3)
        model[2].weight.fill_(8**0.5)  # every unit has the norm 5
    units = pr.train.coupled_units(model, X)
    # the step leaves (s - 0.1 / 5) of a unit: zero where that is at most epsilon
    assert plane(units, model, [1.0, 0.5, 0.43, 0.4], 0.4).tolist() == pytest.approx([0.98, 0.48, 0.41, 0])


def test_a_unit_that_turns_around_is_zero_and_the_last_one_stays() -> None:
    model = mlp()
    units = pr.train.coupled_units(model, X, only=["0"])
    got = plane(units, model, [0.9, -0.1, 0.5, -0.2, 0.3, 0.2], 0.0)
    assert got.eq(0).tolist() == [False, True, False, True, False, False]
    assert int(plane(units, mlp(), [-1.0] * 6, 0.0).ne(0).sum()) == 1
    assert int(plane(units, mlp(), [-1.0] * 6, 0.0, start=1).ne(0).sum()) == 6


def test_one_unit_of_every_group_stays() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pr.train.Proximal(model, optimizer, pr.train.coupled_units(model, X), group=100.0, min_units=2):
        optimizer.step()
    assert pr.planning.plan_zeros(model, X).got == pytest.approx(1 - 4 / 11)


def test_requests_that_make_no_sense() -> None:
    model = mlp()
    units = pr.train.coupled_units(model, X)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(RequestError, match="does not train 2"):
        pr.train.Proximal(model, optimizer, units, group=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RequestError, match="positive strength"):
        pr.train.Proximal(model, optimizer, units)
    with pytest.raises(RequestError, match="epsilon"):
        pr.train.HalfSpace(model, optimizer, units, strength=1.0, epsilon=1.0)
    with pytest.raises(RequestError, match=r"Channel\(\) and Head\(\)"):
        pr.train.coupled_units(model, X, granularity=pr.Width())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no parameter"):
        pr.train.Proximal(nn.Linear(2, 2), optimizer, units, group=1.0)
