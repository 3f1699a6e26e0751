"""ADMM training: weights and their sparse copy agree in the end, for every granularity."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from tests.graphs import convnet, images, mlp, square_loss

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)


def quadratic(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer of 4 x 8 and the convex loss `sum of (w - a)^T H (w - a) / 2` over its rows, in float64."""
    generator = torch.Generator().manual_seed(seed)
    root, goal = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (16, 4))
    layer = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(goal)
    return layer, root.T @ root / 16, goal


def solve(layer: nn.Linear, hessian: Tensor, goal: Tensor, admm: pr.train.AdmmTraining) -> None:
    """The minimum over W of the loss and the penalty, whose gradient is `rho (W - Z + U)`."""
    layer.weight.grad = None
    admm(layer).backward()
    with torch.no_grad():
        rest = layer.weight.grad - admm.rho * layer.weight  # rho (U - Z)
        layer.weight.copy_((goal @ hessian - rest) @ torch.linalg.inv(hessian + admm.rho * torch.eye(8)).double())


GRANULARITIES = {"element": pr.Element(), "2:4": pr.NM(2, 4), "block": pr.Block(2, 2)}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_on_a_convex_quadratic_weights_and_copy_meet(granularity: str) -> None:
    layer, hessian, goal = quadratic()
    recipe, x = pr.Recipe(granularity=GRANULARITIES[granularity]), torch.ones(1, 8, dtype=torch.float64)
    admm = pr.train.AdmmTraining(layer, lambda m: pr.plan(m, x, recipe, target=pr.Sparsity(0.5)), rho=2.4)
    assert admm.rho > float(torch.linalg.eigvalsh(hessian)[-1])  # where it converges, and the fastest
    first = admm.distance
    for _ in range(90):
        solve(layer, hessian, goal, admm)
        admm.update()
    assert first > 0.1 and admm.distance < 1e-6
    assert int(torch.count_nonzero(admm.targets["weight"])) == 16
    mask = admm.plan.masks["weight"]
    assert torch.equal(admm.targets["weight"] != 0, mask)
    before = layer.weight.detach().clone()
    pr.apply_(layer, admm.plan)
    assert torch.allclose(layer.weight, before, atol=1e-6) and int(torch.count_nonzero(layer.weight)) == 16
    for row in range(4):  # the loss has no slope left along what is kept
        slope = (layer.weight[row] - goal[row]) @ hessian
        assert float(slope.detach()[mask[row]].abs().max()) < 1e-4


def test_one_update_by_hand() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    recipe = pr.Recipe(granularity=pr.Element())
    admm = pr.train.AdmmTraining(layer, lambda m: pr.plan(m, X, recipe, target=pr.Sparsity(0.5)), rho=0.5)
    assert admm.targets["weight"].tolist() == [[4, 3, 0, 0]] and admm.distance == pytest.approx(5**0.5)
    assert admm(layer).item() == pytest.approx(0.25 * 5)
    admm.update()
    assert admm.duals["weight"].tolist() == [[0, 0, 2, 1]]
    assert admm(layer).item() == pytest.approx(0.25 * (4**2 + 2**2))
    admm.update()  # of [4, 3, 4, 2]: the third catches up, and loses the tie for the second place to nobody
    assert admm.targets["weight"].tolist() == [[4, 0, 4, 0]]
    assert admm.duals["weight"].tolist() == [[0, 3, 0, 2]]


def test_channels_and_the_training_loop() -> None:
    model, data = convnet(), images()
    admm = pr.train.AdmmTraining(model, lambda m: pr.plan(m, data[0], target=pr.Sparsity(0.3)), rho=2.0)
    first = admm.distance
    assert admm(copy.deepcopy(model)) == admm(model)
    for _ in range(8):
        pr.finetune(model, data, pr.train.penalized(square_loss, admm), steps=10, lr=0.02)
        admm.update()
    assert admm.distance < 0.5 * first
    small = pr.shrink(model, admm.plan)
    assert sum(p.numel() for p in small.parameters()) == admm.plan.after.params


def test_requests_that_make_no_sense() -> None:
    project: Callable[[nn.Module], pr.Plan] = lambda m: pr.plan(m, X, target=pr.Sparsity(0.0))  # noqa: E731
    with pytest.raises(RequestError, match="rho=0"):
        pr.train.AdmmTraining(mlp(), project, rho=0.0)
    with pytest.raises(RequestError, match="removes nothing"):
        pr.train.AdmmTraining(mlp(), project)
