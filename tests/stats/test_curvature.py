"""Curvature against second derivatives, dense inverses and gradients of single samples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.model.forward import samples
from prunella.model.state import untouched
from prunella.registry.method import knobs_of
from prunella.stats import STATISTICS, Source, Subject, collect
from tests.graphs import convnet, images, mlp, square_loss

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gather(model: nn.Module, name: str, data: list[Tensor], **knobs: object) -> dict[str, Tensor]:
    graph = couple(model, data[0])
    with untouched(model, 0):
        subject = Subject(model, graph, layers=graph.layers)
        return dict(collect(subject, [name], Source(data, square_loss), knobs=knobs).values[name])


def one_by_one(model: nn.Module, name: str) -> Tensor:
    """The gradient of every sample of X, stacked."""
    weight = dict(model.named_parameters())[name]
    return torch.stack([torch.autograd.grad(square_loss(model, x), weight)[0] for x in X.split(1)])


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    rows = torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    found = gather(model, "hessian_diag", [rows], probes=1)["0.weight"]
    assert found.tolist() == [pytest.approx([2 * v**2 / 4 for v in (1, 2, 3, 4)])]


def test_hutchinson_comes_near_the_diagonal_of_a_full_hessian() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    weight = model[0].weight

    def loss(value: Tensor) -> Tensor:
        hidden = torch.tanh(X @ value.T + model[0].bias)
        return (model[2](hidden) - 1).square().mean()

    exact = torch.autograd.functional.hessian(loss, weight.detach()).reshape(12, 12).diagonal().view(3, 4)
    few, many = (gather(model, "hessian_diag", [X], probes=n)["0.weight"] for n in (2, 2000))
    assert (many - exact).norm() < 0.1 * exact.norm() < (few - exact).norm()


def test_fisher_squares_before_it_averages_over_samples() -> None:
    model = mlp().double()
    found = gather(model, "fisher_diag", [X[:7], X[7:]])["2.weight"]
    assert torch.allclose(found, one_by_one(model, "2.weight").square().mean(0))
    of_batches = gather(model, "grad_sq", [X])["2.weight"]
    assert float(found.sum()) > 1.5 * float(of_batches.sum())


def test_gradients_of_samples_are_those_of_batches_of_one() -> None:
    model = mlp().double()
    assert torch.allclose(gather(model, "sample_grad", [X])["0.weight"], one_by_one(model, "0.weight"))


def test_the_blocked_inverse_is_that_of_each_dense_block() -> None:
    model = mlp().double()
    found = gather(model, "fisher_inverse", [X[:5], X[5:]], damping=1e-3, block=4)["2.weight"]
    g = one_by_one(model, "2.weight")
    assert found.shape == (5, 2, 4, 4)
    for row in range(5):
        for number, columns in enumerate((slice(0, 4), slice(4, 6))):
            part = g[:, row, columns]
            dense = torch.linalg.inv(part.T @ part / 12 + 1e-3 * torch.eye(part.shape[1], dtype=torch.float64))
            size = len(dense)
            assert torch.allclose(found[row, number, :size, :size], dense, rtol=1e-9)
    diagonal = gather(model, "fisher_inverse_diag", [X], damping=1e-3, block=4)["2.weight"]
    assert torch.allclose(diagonal, found.diagonal(dim1=-2, dim2=-1).flatten(1)[:, :6])


def test_knobs_of_a_criterion_reach_the_statistic() -> None:
    model = mlp()
    recipe = pr.Recipe(criterion=partial(pr.criteria.obs_saliency, block=3), granularity=pr.Element())
    data = [X.float()]
    one = pr.plan(model, data[0], recipe, target=pr.Sparsity(0.5), data=data, loss=square_loss)
    assert one.recipe["criterion"]["knobs"] == {"damping": 1e-5, "block": 3}
    with pytest.raises(pr.PruningError, match="block=0"):
        broken = pr.Recipe(criterion=partial(pr.criteria.obs_saliency, block=0), granularity=pr.Element())
        pr.plan(model, data[0], broken, target=pr.Sparsity(0.5), data=data, loss=square_loss)
    with pytest.raises(pr.PruningError, match="probes=0"):
        pr.plan(
            model,
            data[0],
            pr.Recipe(criterion=partial(pr.criteria.obd, probes=0)),
            target=pr.Sparsity(0.5),
            data=data,
            loss=square_loss,
        )


@pytest.mark.parametrize("criterion", [pr.criteria.obd, pr.criteria.obs_saliency, pr.criteria.obert])
def test_a_criterion_and_its_statistic_have_the_same_defaults(criterion: object) -> None:
    from prunella.registry.method import needs_of

    for need in needs_of(criterion):  # type: ignore[arg-type]
        slot = STATISTICS[need].slot
        mine = knobs_of(slot) if slot else {}
        assert mine.items() <= knobs_of(criterion).items()  # type: ignore[arg-type]


def test_batches_are_split_whatever_they_are_made_of() -> None:
    parts = list(samples({"x": torch.arange(4).view(2, 2), "y": (torch.arange(2), None, 7)}))
    assert [p["x"].tolist() for p in parts] == [[[0, 1]], [[2, 3]]]
    assert parts[1]["y"][0].tolist() == [1] and parts[1]["y"][1:] == (None, 7)
    with pytest.raises(pr.PruningError, match="cannot be split into samples"):
        list(samples((torch.zeros(3), torch.zeros(2))))


def test_convolutions_too() -> None:
    model, data = convnet().eval(), images()
    weight = model[3].weight
    per_sample = [torch.autograd.grad(square_loss(model, x), weight)[0] for batch in data for x in batch.split(1)]
    expected = torch.stack(per_sample).square().mean(0)
    assert torch.allclose(gather(model, "fisher_diag", data)["3.weight"], expected, rtol=1e-4)
