"""The probe's squared gate gradients against the squared change of the output that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.app.probe import output_probe


def logits(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch[0])
    return found


def test_mean_square_of_the_gradient_is_the_squared_change_of_the_output() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 5, bias=False).double(), torch.randn(4, 3, dtype=torch.float64)
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def gated(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch[0] * gate)
        return found

    squares = torch.zeros(3, dtype=torch.float64)
    for tag in range(4000):  # the tag makes every batch another one, with other signs
        (gradient,) = torch.autograd.grad(output_probe(gated)(model, (x, torch.tensor([tag]))), gate)
        squares += gradient.square() / 4000
    exact = (x.square().sum(0) * model.weight.detach().square().sum(0)).tolist()
    assert squares.tolist() == pytest.approx(exact, rel=0.1)


def test_the_same_batch_has_the_same_signs_and_another_batch_others() -> None:
    model, x = nn.Linear(8, 8), torch.randn(16, 8)
    loss = output_probe(logits)
    assert loss(model, (x,)) == loss(model, (x.clone(),))
    assert loss(model, (x, torch.tensor(0))) != loss(model, (x, torch.tensor(1)))


def test_taylor_sees_what_a_distillation_loss_cannot() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), [(torch.randn(32, 4),)]
    with torch.no_grad():
        model[2].weight[:, 2] = 0.0
    plan = pr.plan(
        model, data[0][0], pr.Recipe(pr.taylor), target=pr.Sparsity(0.1), data=data, loss=output_probe(logits)
    )
    assert plan.keep["0"].tolist() == [True, True, False, True, True, True]
