"""Means of removed units in the biases of what reads them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import prunella as pr
from prunella.recovery.fold_means import fold_means
from tests.graphs import mlp


def cut(model: nn.Module, x: Tensor, sparsity: float, criterion: object = pr.magnitude, **more: object) -> pr.Plan:
    return pr.plan(model, x, pr.Recipe(criterion), target=pr.Sparsity(sparsity), **more)  # type: ignore[arg-type]


def constant_mlp() -> nn.Sequential:
    """Units 1 and 4 of the first layer are constant, 2.5 and 0.5, and the layer's smallest."""
    model = mlp().double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([2.5, 0.5], dtype=torch.float64)
    return model


def test_a_unit_with_a_constant_output_folds_exactly() -> None:
    model, x = constant_mlp(), torch.randn(20, 4, dtype=torch.float64)
    plan = cut(model, x, 1 / 3, only=["0"])
    assert plan.keep["0"].tolist() == [True, False, True, True, False, True]
    small = pr.shrink(model, plan)
    assert not torch.allclose(small(x), model(x), rtol=1e-3)
    bias = model[2].bias + 2.5 * model[2].weight[:, 1] + 0.5 * model[2].weight[:, 4]
    report = fold_means(small, model, [x[:7], x[7:]], plan)
    assert torch.allclose(small[2].bias, bias, rtol=1e-12)
    assert torch.allclose(small(x), model(x), rtol=1e-10, atol=1e-12)
    assert [(fold.name, fold.skipped) for fold in report.folds] == [("2.weight", "")] and "2.weight" in str(report)


def test_a_varying_unit_leaves_its_mean() -> None:
    model, x = mlp().double(), torch.randn(30, 4, dtype=torch.float64)
    plan = cut(model, x, 0.5, only=["0"])
    small = pr.shrink(model, plan)
    before = small[2].bias.detach().clone()
    fold_means(small, model, [x], plan)
    pruned = ~plan.keep["0"]
    mean = model[:2](x).mean(0).detach()
    assert torch.allclose(small[2].bias - before, model[2].weight[:, pruned] @ mean[pruned], rtol=1e-10)
    assert torch.allclose(small[:3](x).mean(0), model[:3](x).mean(0), rtol=1e-9)


class Scaled(nn.Module):
    """Convolution, batch norm with scales of zero, ReLU, convolution with a bias."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3, padding=padding)
        with torch.no_grad():
            self.n.weight.uniform_(0.5, 1.5)
            self.n.bias.copy_(torch.tensor([0.1, 0.7, -0.3, 0.2, -0.4, 0.6]))
            self.n.weight[[1, 4]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(relu(self.n(self.a(x))))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_channel_of_scale_zero_is_the_constant_that_its_activation_makes_of_the_shift(padding: int) -> None:
    model, x = Scaled(padding).double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plan = cut(model, x, 1 / 3, pr.criteria.bn_scale)
    assert plan.keep["a"].tolist() == [True, False, True, True, False, True]
    small = pr.shrink(model, plan)
    fold_means(small, model, [x], plan)
    kernel = model.b.weight.sum((2, 3))
    assert torch.allclose(small.b.bias, model.b.bias + relu(model.n.bias[1]) * kernel[:, 1], rtol=1e-12)
    got, asked = small(x), model(x)
    inner = slice(padding, -padding or None)
    assert torch.allclose(got[..., inner, inner], asked[..., inner, inner], rtol=1e-10, atol=1e-12)
    assert torch.allclose(got, asked, rtol=1e-6) == (padding == 0)


def test_fluctuation_removes_what_the_bias_can_replace_exactly() -> None:
    model, x = constant_mlp(), torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 5, -1000  # dead, not for want of weights
        model[2].weight[:, 1] *= 100
    plan = cut(model, x, 1 / 3, pr.criteria.fluctuation, data=[x], only=["0"])
    assert plan.keep["0"].tolist() == [True, False, True, True, False, True]
    small = pr.shrink(model, plan)
    fold_means(small, model, [x], plan)
    assert torch.allclose(small(x), model(x), rtol=1e-9, atol=1e-12)


def test_the_masked_model_is_corrected_like_the_small_one() -> None:
    model, x = mlp().double(), torch.randn(30, 4, dtype=torch.float64)
    plan = cut(model, x, 0.5)
    small, masked = pr.shrink(model, plan), pr.apply_(copy.deepcopy(model), plan)
    fold_means(small, model, [x], plan)
    fold_means(masked, model, [x], plan)
    assert torch.allclose(small(x), masked(x), rtol=1e-10, atol=1e-12)


def test_a_layer_without_a_bias_is_named() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), torch.randn(9, 4)
    plan = cut(model, x, 0.5)
    small = pr.shrink(model, plan)
    keys = list(small.state_dict())
    report = fold_means(small, model, [x], plan)
    assert [fold.skipped for fold in report.folds] == ["it has no bias for the constant"]
    assert list(small.state_dict()) == keys and "skipped" in str(report)


def test_a_generator_of_batches_is_used_once_and_nothing_else_changes() -> None:
    model, x = mlp().double(), torch.randn(30, 4, dtype=torch.float64)
    plan = cut(model, x, 0.5, only=["0"])
    small, again = pr.shrink(model, plan), pr.shrink(model, plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold_means(small, model, (part for part in x.split(10)), plan)
    fold_means(again, model, [x], plan)
    assert torch.allclose(small[2].bias, again[2].bias, rtol=1e-12)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert small[0].weight.equal(again[0].weight)
