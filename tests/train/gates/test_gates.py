"""Learned masks: their numbers, and that they come off without a trace."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import mse_loss

import prunella as pr
from prunella.errors import RequestError
from prunella.recovery.finetune import Training
from prunella.schedules import linear
from prunella.train.gates.gate import gates_of
from prunella.train.gates.hard_concrete import HardConcrete
from prunella.train.gates.movement import Moved, SoftlyMoved, masked
from prunella.train.gates.thresholds import SoftThreshold
from prunella.train.gates.variational import Variational, divergence
from prunella.train.penalty.units import CoupledUnits
from tests.graphs import Attention, convnet, images, mlp, square_loss

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)
FAST = Training(optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr), lr_schedule=lambda progress: 1.0)
KINDS: dict[str, Callable[[nn.Module, CoupledUnits], nn.Module]] = {
    "l0": lambda m, u: pr.train.l0_gates_(m, u),
    "l0 of weights": lambda m, u: pr.train.l0_gates_(m, u, per_weight=True),
    "movement": lambda m, u: pr.train.top_movement_(m, u, sparsity=0.5),
    "soft movement": lambda m, u: pr.train.soft_movement_(m, u),
    "threshold": lambda m, u: pr.train.learned_threshold_(m, u),
    "variational": lambda m, u: pr.train.variational_dropout_(m, u),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def penalty_loss(strength: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return pr.train.penalized(square_loss, pr.train.gate_penalty, strength)


@kinds
def test_gates_come_off_without_a_trace(kind: str) -> None:
    model, batch = convnet(), images()[0]
    keys, before = list(model.state_dict()), list(map(id, model.parameters()))
    KINDS[kind](model, pr.train.coupled_units(model, batch))
    assert list(model.state_dict()) != keys
    pr.finetune(model, [batch], penalty_loss(1e-3), steps=5, lr=0.05, training=FAST)
    pr.train.step_gates_(model, 1.0)
    model.eval()
    output = model(batch)
    assert pr.train.merge_gates_(model) is model
    assert torch.allclose(model(batch), output, atol=1e-6)
    assert list(model.state_dict()) == keys and list(map(id, model.parameters())) == before
    assert type(model[0]) is nn.Conv2d and not model._forward_pre_hooks
    assert all(not key.startswith("_prunella") for m in model.modules() for key in m.__dict__)
    pr.plan(model, batch, target=pr.Sparsity(0.3))


@kinds
def test_a_gated_model_can_be_copied_and_saved(kind: str) -> None:
    model, batch = convnet(), images()[0]
    units = pr.train.coupled_units(model, batch)
    KINDS[kind](model, units)
    pr.finetune(model, [batch], penalty_loss(1e-3), steps=3, lr=0.1, training=FAST)
    replica = copy.deepcopy(model).eval()
    assert torch.equal(replica(batch), model.eval()(batch))
    assert pr.train.gate_penalty(replica) == pr.train.gate_penalty(model)
    replica.train(), model.train()
    torch.manual_seed(0)
    first = replica(batch)
    torch.manual_seed(0)
    assert torch.equal(model(batch), first)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = KINDS[kind](convnet(seed=5), units)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.eval()(batch), model.eval()(batch))
    assert list(pr.train.merge_gates_(replica).state_dict()) == list(convnet().state_dict())
    assert gates_of(model)


def test_weights_that_cannot_bear_a_gate() -> None:
    model = mlp()
    units = pr.train.coupled_units(model, X)
    pr.train.l0_gates_(model, pr.train.coupled_units(model, X, only=["4"]), per_weight=True)
    with pytest.raises(RequestError, match=r"merge_gates_\(model\) removes gates"):
        pr.train.l0_gates_(model, units)
    with pytest.raises(RequestError, match="carries gates already"):
        pr.train.l0_gates_(model, pr.train.coupled_units(mlp(), X, only=["0"]))
    with pytest.raises(RequestError, match="no gates"):
        pr.train.gate_penalty(mlp())
    with pytest.raises(RequestError, match="no parameter"):
        pr.train.coupled_units(pr.train.merge_gates_(model), X) and pr.train.top_movement_(
            nn.Linear(2, 2), units, sparsity=0.5
        )
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(RequestError, match=r"it is tied: 0\.weight = 2\.weight"):
        pr.train.learned_threshold_(tied, pr.train.coupled_units(tied, X))
    pruned = mlp()
    pr.apply_(pruned, pr.plan(pruned, X, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5)))
    with pytest.raises(RequestError, match="carries masks"):
        pr.train.top_movement_(pruned, units, sparsity=0.5)
    for wrong in (-0.1, 1.0):
        with pytest.raises(RequestError, match="out of range"):
            pr.train.top_movement_(mlp(), units, sparsity=wrong)
    with pytest.raises(RequestError, match="out of range"):
        pr.train.step_gates_(model, 1.5)


# -- L0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_alpha", "alive"), [(0.0, 0.8318), (0.7, 0.9088), (-2.0, 0.4010)])
def test_the_probability_that_a_hard_concrete_gate_is_open(log_alpha: float, alive: float) -> None:
    gate = HardConcrete(torch.ones(400_000), log_alpha)
    assert gate.alive()[0].item() == pytest.approx(alive, abs=6e-5)
    torch.manual_seed(0)
    gate.draw()
    value = gate.value()
    assert float((value != 0).float().mean()) == pytest.approx(alive, abs=2.5e-3)
    assert bool((value == 0).any()) and bool((value == 1).any()) and value.min() >= 0 and value.max() <= 1
    inside = value[(value > 0.2) & (value < 0.3)]
    level = (torch.tensor([0.2, 0.3]) + 0.1) / 1.2
    low, high = torch.sigmoid(2 / 3 * torch.logit(level) - log_alpha).tolist()
    assert len(inside) / 400_000 == pytest.approx(high - low, abs=2e-3)


def test_in_evaluation_a_gate_has_no_noise() -> None:
    gate = HardConcrete(torch.ones(3), 0.0).eval()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([0.0, math.log(11), -math.log(11)]))
    values = gate.value()
    gate.draw()
    assert torch.equal(gate.value(), values)
    assert values.tolist() == pytest.approx([0.5, 1, 0], abs=1e-6)


def test_the_l0_penalty_counts_weights_that_are_expected() -> None:
    model = mlp()
    pr.train.l0_gates_(model, pr.train.coupled_units(model, X), start=0.7)
    assert pr.train.gate_penalty(model).item() == pytest.approx(0.9088 * (6 * 10 + 5 * 10), abs=5e-3)
    model = pr.train.l0_gates_(mlp(), pr.train.coupled_units(mlp(), X), start=0.0, per_weight=True)
    assert pr.train.gate_penalty(model).item() == pytest.approx(0.8318 * (24 + 30 + 15), abs=5e-3)


class Twice(nn.Module):
    """Two layers read the same hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.make(x))
        return self.one(hidden) + self.two(hidden)


def test_all_readers_of_a_unit_share_one_gate_and_its_noise() -> None:
    torch.manual_seed(0)
    model = Twice()
    plain = copy.deepcopy(model)
    pr.train.l0_gates_(model, pr.train.coupled_units(model, X), start=0.0)
    assert len(gates_of(model)) == 1 and len(list(model.parameters())) == 7
    model(X)
    factors = [getattr(model, n).weight / getattr(plain, n).weight for n in ("one", "two")]
    assert torch.allclose(factors[0], factors[1]) and torch.allclose(factors[0][0], factors[0][1])
    assert not torch.allclose(factors[0][0, :3], factors[0][0, 3:])
    assert torch.equal(model.make.weight, plain.make.weight)
    old = factors[0][0].clone()
    model(X)
    assert not torch.allclose(model.one.weight[0] / plain.one.weight[0], old)


@pytest.mark.parametrize("make", [convnet, Attention])
def test_units_that_gates_close_are_removed_exactly(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    batch = images()[0] if make is convnet else torch.randn(2, 5, 8)
    pr.train.l0_gates_(model, pr.train.coupled_units(model, batch), start=0.5)
    strength = 1e-3 if make is convnet else 1e-2
    pr.finetune(model, [batch], penalty_loss(strength), steps=60, lr=0.1, training=FAST)
    pr.train.merge_gates_(model)
    plan = pr.planning.plan_zeros(model, batch)
    small = pr.shrink(model, plan).eval()
    assert torch.allclose(small(batch), model.eval()(batch), atol=1e-5)
    assert 0 < plan.got < 1


def test_single_weights_that_gates_close_are_masks() -> None:
    model = mlp()
    pr.train.l0_gates_(model, pr.train.coupled_units(model, X), start=0.0, per_weight=True)
    pr.finetune(model, [X], penalty_loss(1e-2), steps=60, lr=0.1, training=FAST)
    plan = pr.planning.plan_zeros(pr.train.merge_gates_(model), X, granularity=pr.Element())
    assert 0 < plan.got < 1
    pr.finalize(pr.apply_(model, plan))


# -- movement --------------------------------------------------------------------------------------------------------


def test_scores_get_the_product_of_gradient_and_weight_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scores, target = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 4, generator=generator) > 0.5
    weight.requires_grad_(), scores.requires_grad_()
    seen = masked(weight, scores, mask)
    seen.retain_grad()
    (seen.sin() * target).sum().backward()
    assert seen.grad is not None
    assert torch.equal(scores.grad, seen.grad * weight) and torch.equal(weight.grad, seen.grad * mask)
    assert torch.equal(seen, weight * mask)


def test_weights_that_shrink_score_below_zero() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0]]))
    pr.train.top_movement_(layer, pr.train.coupled_units(layer, torch.ones(1, 2)), sparsity=0.5)
    gate = next(m for m in layer.modules() if isinstance(m, Moved))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wanted, total = torch.tensor([[0.2, 2.0]]), torch.zeros(1, 2)
    for _ in range(5):
        optimizer.zero_grad()
        weight = layer.weight
        total -= 0.1 * (weight - wanted).detach() * layer.parametrizations.weight.original.detach()
        (0.5 * (weight - wanted).square().sum()).backward()
        optimizer.step()
    assert torch.allclose(gate.scores, total) and gate.scores[0, 0] < 0 < gate.scores[0, 1]
    pr.train.merge_gates_(layer)
    assert layer.weight[0, 0] == 0 and 1 < layer.weight[0, 1] < 2


def test_movement_follows_its_schedule_exactly() -> None:
    model = pr.train.top_movement_(mlp(), pr.train.coupled_units(mlp(), X), sparsity=0.8, schedule=linear)
    with torch.no_grad():
        for gate, _ in gates_of(model):
            gate.scores.normal_()  # type: ignore[operator,union-attr]
    for progress in (0.0, 0.5, 1.0):
        pr.train.step_gates_(model, progress)
        for layer, count in ((0, 24), (2, 30), (4, 15)):
            gate = model[layer].parametrizations.weight[0]
            assert int((~gate.mask()).sum()) == round(0.8 * progress * count)
            kept = gate.scores[gate.mask()]
            assert progress == 0 or kept.min() >= gate.scores[~gate.mask()].max()


def test_movement_in_a_training_loop() -> None:
    model, batch = mlp(), X
    pr.train.top_movement_(model, pr.train.coupled_units(model, batch), sparsity=0.5)
    pr.finetune(
        model, [batch], penalty_loss(0.0), steps=20, lr=0.02, training=FAST,
        on_step=lambda step, *_: pr.train.step_gates_(model, (step + 1) / 20) and None,
    )  # fmt: skip
    plan = pr.planning.plan_zeros(pr.train.merge_gates_(model), batch, granularity=pr.Element())
    assert [row.total - row.kept for row in plan.rows] == [12, 15, 8]


def test_soft_movement_closes_scores_below_the_threshold() -> None:
    gate = SoftlyMoved(torch.ones(4), 0.1)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([-3.0, -2.2, -2.19, 5.0]))
    assert gate.mask().tolist() == [False, False, True, True]  # sigmoid(-2.1972) = 0.1
    assert gate.cost(torch.ones(4)).item() == pytest.approx(0.04743 + 0.09975 + 0.10065 + 0.99331, abs=1e-4)
    model = pr.train.soft_movement_(mlp(), pr.train.coupled_units(mlp(), X))
    pr.finetune(model, [X], penalty_loss(1e-2), steps=60, lr=0.1, training=FAST)
    assert 0 < pr.planning.plan_zeros(pr.train.merge_gates_(model), X, granularity=pr.Element()).got < 1


# -- learned thresholds ----------------------------------------------------------------------------------------------


def test_the_gradient_of_a_learned_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    gate = SoftThreshold(weight, -0.5)
    limit = torch.sigmoid(torch.tensor(-0.5, dtype=torch.float64))
    made = gate(weight)
    assert torch.allclose(made, weight.sign() * (weight.abs() - limit).relu(), atol=1e-15)
    (made * grad).sum().backward()
    active = weight.abs() > limit
    expected = -(limit * (1 - limit)) * (weight.sign() * grad)[active].sum()
    assert gate.s.grad is not None and torch.allclose(gate.s.grad, expected, rtol=1e-12)
    assert gradcheck(lambda s: pr.train.soft_threshold(weight, torch.sigmoid(s)), gate.s.detach().requires_grad_())


def test_decay_of_the_threshold_prunes() -> None:
    model = pr.train.learned_threshold_(mlp(), pr.train.coupled_units(mlp(), X), start=-4.0)
    assert pr.train.gate_penalty(model).item() == pytest.approx(3 * 8)
    pr.finetune(model, [X], penalty_loss(1.0), steps=40, lr=0.1, training=FAST)
    limit = float(torch.sigmoid(model[0].parametrizations.weight[0].s.detach()))
    assert 0.02 < limit < 0.5
    got = [
        row.kept / row.total
        for row in pr.planning.plan_zeros(pr.train.merge_gates_(model), X, granularity=pr.Element()).rows
    ]
    assert min(got) < 1


# -- variational dropout ---------------------------------------------------------------------------------------------


def test_the_divergence_of_variational_dropout() -> None:
    log_alpha = torch.tensor([-8.0, -2.0, 0.0, 2.0, 8.0, 60.0], dtype=torch.float64)
    alpha = log_alpha.exp()
    fit = 0.63576 * torch.sigmoid(1.87320 + 1.48695 * log_alpha) - 0.5 * torch.log1p(1 / alpha) - 0.63576
    assert torch.allclose(divergence(log_alpha), -fit, atol=1e-12)
    assert divergence(log_alpha)[-1] < 1e-12 and bool((divergence(log_alpha).diff() < 0).all())
    # the divergence itself: E log|w| - log sigma + constant, by sampling w = 1 + sqrt(alpha) e
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = torch.stack([(1 + a.sqrt() * noise).abs().log().mean() - a.log() / 2 for a in alpha[:5]])
    limit = noise.abs().log().mean()  # as the noise grows
    assert torch.allclose(divergence(log_alpha[:5]), sampled - limit, atol=0.02)


def test_variational_noise_has_the_variance_it_says_and_mostly_noise_goes() -> None:
    weight = torch.full((200_000,), 0.5)
    gate = Variational(weight, math.log(0.04), 3.0)
    torch.manual_seed(0)
    gate.draw()
    noisy = gate(weight).detach() - weight
    assert float(noisy.std()) == pytest.approx(0.2, abs=1e-3) and abs(float(noisy.mean())) < 2e-3
    edges = torch.tensor([2.99, 3.01, -3.0])
    gate = Variational(torch.ones(3), 0.0, 3.0).eval()
    with torch.no_grad():
        gate.log_sigma2.copy_(edges + 2 * math.log(2.0))
    assert gate.log_alpha(torch.full((3,), 2.0)).tolist() == pytest.approx(edges.tolist(), abs=1e-5)
    assert gate(torch.full((3,), 2.0)).tolist() == [2, 0, 2]


def test_variational_dropout_removes_weights_that_do_nothing() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 1, bias=False), torch.randn(64, 6)
    target = x[:, :1] * 2 - x[:, 1:2]
    pr.train.variational_dropout_(layer, pr.train.coupled_units(layer, x), start=-6.0)
    loss = pr.train.penalized(lambda m, b: mse_loss(m(b), target), pr.train.gate_penalty, 1 / 64)
    pr.finetune(layer, [x], loss, steps=900, lr=0.05, training=FAST)
    assert (pr.train.merge_gates_(layer).weight != 0).tolist() == [[True, True, False, False, False, False]]
