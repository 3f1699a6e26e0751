"""OBS on quadratics, where it is exact, and the inverses that stand in for the Hessian."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.solvers.obs import cut, cut_matrix_free, cut_one_by_one, inverse_fisher, inverse_product, saliency
from tests.graphs import square_loss

N = 8


def quadratic(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights at the minimum, a Hessian, and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(N, 3 * N, generator=generator, dtype=torch.float64)
    hessian = half @ half.T / N
    return torch.randn(N, generator=generator, dtype=torch.float64), hessian, torch.linalg.inv(hessian)


def cost(hessian: Tensor, change: Tensor) -> float:
    return float(change @ hessian @ change) / 2


def pruned(*places: int) -> Tensor:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[list(places)] = True
    return mask


@pytest.mark.parametrize("q", range(N))
def test_the_predicted_loss_of_one_weight_is_the_actual_one(q: int) -> None:
    w, hessian, inverse = quadratic()
    found = cut(w, inverse, pruned(q))
    assert found.weight[q] == 0
    assert cost(hessian, found.weight - w) == pytest.approx(float(saliency(w, inverse)[q]), rel=1e-12)
    assert float(found.loss) == pytest.approx(float(saliency(w, inverse)[q]), rel=1e-12)


@pytest.mark.parametrize("places", [(0, 1), (2, 5, 7), tuple(range(N))])
def test_a_set_jointly_is_the_minimum_over_what_stays_and_one_by_one_is_the_same(places: tuple[int, ...]) -> None:
    w, hessian, inverse = quadratic()
    mask = pruned(*places)
    found, single = cut(w, inverse, mask), cut_one_by_one(w, inverse, mask)
    remaining = ~mask
    best = -w.clone()
    best[remaining] = torch.linalg.solve(hessian[remaining][:, remaining], hessian[remaining][:, mask] @ w[mask])
    assert torch.allclose(found.weight, w + best, rtol=1e-10, atol=1e-10)
    at = torch.tensor(places)
    closed = w[at] @ torch.linalg.solve(inverse[at][:, at], w[at]) / 2
    assert float(found.loss) == pytest.approx(float(closed), rel=1e-12)
    assert float(found.loss) == pytest.approx(cost(hessian, found.weight - w), rel=1e-10)
    assert torch.allclose(single.weight, found.weight, rtol=1e-9, atol=1e-10)
    assert float(single.loss) == pytest.approx(float(found.loss), rel=1e-10)


def test_the_cheapest_pair_is_found_by_nobody_else() -> None:
    w, hessian, inverse = quadratic(3)
    pairs = {pair: float(cut(w, inverse, pruned(*pair)).loss) for pair in itertools.combinations(range(N), 2)}
    for pair, loss in pairs.items():
        mask = pruned(*pair)
        assert loss <= cost(hessian, torch.where(mask, -w, 0.0)) + 1e-12


def test_on_a_diagonal_hessian_obs_is_obd_and_nothing_moves() -> None:
    w, hessian, _ = quadratic()
    diagonal = hessian.diagonal().abs()
    inverse = torch.diag(1 / diagonal)
    assert torch.allclose(saliency(w, inverse), pr.criteria.obd(w, diagonal), rtol=1e-14)
    found = cut(w, inverse, pruned(1, 4))
    assert torch.equal(found.weight, torch.where(pruned(1, 4), 0.0, w))


def test_many_quadratics_with_sets_of_other_sizes_at_once() -> None:
    ws, hs, inverses = (torch.stack(parts) for parts in zip(*map(quadratic, range(3)), strict=True))
    masks = torch.stack([pruned(0), pruned(1, 2, 3), pruned()])
    found = cut(ws, inverses, masks)
    for k in range(3):
        alone = cut(ws[k], inverses[k], masks[k])
        assert torch.allclose(found.weight[k], alone.weight) and torch.allclose(found.loss[k], alone.loss)
    assert found.weight[2].equal(ws[2]) and hs.shape == inverses.shape


@pytest.mark.parametrize("samples", [3, 40])
def test_the_recursion_gives_the_dense_inverse(samples: int) -> None:
    g = torch.randn(samples, N, dtype=torch.float64)
    dense = torch.linalg.inv(0.01 * torch.eye(N, dtype=torch.float64) + g.T @ g / samples)
    assert (inverse_fisher(g, 0.01) - dense).abs().max() < 1e-10 * dense.abs().max()
    blocks = inverse_fisher(g.view(samples, 2, N // 2), 0.01)
    for k, part in enumerate(g.split(N // 2, 1)):
        one = torch.linalg.inv(0.01 * torch.eye(N // 2, dtype=torch.float64) + part.T @ part / samples)
        assert torch.allclose(blocks[k], one, rtol=1e-9, atol=1e-9)


def test_products_without_a_matrix_are_those_with_it() -> None:
    g, v = torch.randn(5, N, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    inverse = inverse_fisher(g, 0.01)
    assert torch.allclose(inverse_product(g, v, 0.01), inverse @ v, rtol=1e-10, atol=1e-10)
    assert torch.allclose(inverse_product(g, v[:, 0], 0.01), inverse @ v[:, 0], rtol=1e-10, atol=1e-10)
    w, mask = torch.randn(N, dtype=torch.float64), pruned(0, 3, 6)
    dense, free = cut(w, inverse, mask), cut_matrix_free(w, g, mask, 0.01)
    assert torch.allclose(dense.weight, free.weight, rtol=1e-9, atol=1e-10)
    assert float(free.loss) == pytest.approx(float(dense.loss), rel=1e-9)


def test_nothing_of_the_size_of_the_matrix_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    n, g = 500, torch.randn(6, 500, dtype=torch.float64)
    with Sizes():
        cut_matrix_free(torch.ones(n, dtype=torch.float64), g, torch.arange(n) % 2 == 0, 1e-3)
        inverse_product(g, torch.ones(n, dtype=torch.float64), 1e-3)
    assert largest == 6 * n


# -- plans -------------------------------------------------------------------------------------------------------------


def linear_problem() -> tuple[nn.Module, list[Tensor]]:
    """A linear layer at the minimum of a square loss over correlated inputs."""
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    return model, [torch.cat([x, model(x).detach() + 0.1 * torch.randn(200, 4, dtype=torch.float64)], 1)]


def fit_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch[:, :6]) - batch[:, 6:]).square().sum(1).mean() / 2


def masked_plan(model: nn.Module, x: Tensor, sparsity: float = 0.5) -> pr.Plan:
    return pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(sparsity))


def least_squares(model: nn.Module, data: list[Tensor], mask: Tensor) -> Tensor:
    """The best weights on a mask, row by row."""
    x, y = data[0][:, :6], data[0][:, 6:]
    rows = torch.zeros_like(mask, dtype=torch.float64)
    for k, kept in enumerate(mask):
        rows[k, kept] = torch.linalg.lstsq(x[:, kept], y[:, k]).solution
    return rows


def test_obs_on_a_linear_layer_is_least_squares() -> None:
    model, data = linear_problem()
    with torch.no_grad():
        model[0].weight.copy_(least_squares(model, data, torch.ones(4, 6, dtype=torch.bool)))
    before = model[0].weight.detach().clone()
    plan = masked_plan(model, data[0][:, :6])
    solved = pr.solvers.obs(model, plan, data, loss=fit_loss, damping=1e-12)
    mask = plan.masks["0.weight"]
    found = solved.weights["0.weight"]
    assert torch.allclose(found, least_squares(model, data, mask), rtol=1e-6, atol=1e-8)
    assert not bool(found[~mask].any()) and model[0].weight.equal(before) and not plan.weights
    assert solved.recipe["solver"] == {"name": "obs", "knobs": {"damping": 1e-12}}
    pr.apply_(model, solved)
    assert model[0].weight.detach().equal(found)


@pytest.mark.parametrize("solver", [pr.solvers.woodfisher, pr.solvers.mfac])
def test_fisher_solvers_give_what_the_dense_fisher_says(solver: object) -> None:
    model, data = linear_problem()
    plan = masked_plan(model, data[0][:, :6])
    halves = [data[0][:120], data[0][120:]]
    solved = solver(model, plan, halves, loss=fit_loss, damping=1e-3, strength=1.0)  # type: ignore[operator]
    weight, mask = model[0].weight.detach(), plan.masks["0.weight"]
    rows = [torch.autograd.grad(fit_loss(model, x), model[0].weight)[0] for x in data[0].split(1)]
    g = torch.stack(rows)
    if solver is pr.solvers.woodfisher:
        expected = cut(weight, inverse_fisher(g, 1e-3), ~mask).weight
    else:
        dense = inverse_fisher(g.flatten(1), 1e-3)
        expected = cut(weight.flatten(), dense, ~mask.flatten()).weight.view(4, 6)
    assert torch.allclose(solved.weights["0.weight"], expected, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(expected, weight * mask, rtol=1e-2)


@pytest.mark.parametrize("solver", [pr.solvers.obs, pr.solvers.woodfisher, pr.solvers.mfac])
def test_solvers_lower_the_loss_of_a_mask(solver: object) -> None:
    model, data = linear_problem()
    plan = masked_plan(model, data[0][:, :6])
    plain, solved = nn.Sequential(nn.Linear(6, 4, bias=False)).double(), nn.Sequential(nn.Linear(6, 4, bias=False))
    solved = solved.double()
    for other in (plain, solved):
        other.load_state_dict(model.state_dict())
    pr.apply_(plain, plan)
    pr.apply_(solved, solver(model, plan, data, loss=fit_loss, damping=1e-4))  # type: ignore[operator]
    assert float(fit_loss(solved, data[0]).detach()) < 0.9 * float(fit_loss(plain, data[0]).detach())


FULL = [pr.solvers.obs, partial(pr.solvers.woodfisher, strength=1.0), partial(pr.solvers.mfac, strength=1.0)]


@pytest.mark.parametrize("solver", FULL)
def test_a_plan_that_cuts_units_is_solved_and_shrunk(solver: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [torch.randn(30, 4, dtype=torch.float64) for _ in range(2)]
    plan = pr.plan(model, data[0], pr.Recipe(), target=pr.Sparsity(0.5))
    solved = solver(model, plan, data, loss=square_loss, damping=1.0)  # type: ignore[operator]
    small = pr.shrink(model, solved)
    kept = plan.cuts["2.weight"][1]
    assert small[2].weight.detach().equal(solved.weights["2.weight"][:, kept])
    moved = (small[2].weight - model[2].weight[:, kept]).detach().abs().max()
    assert float(moved) > 1e-6
    # the rows that stay of the first layer lose no weight, so they do not move
    assert small[0].weight.detach().equal(model[0].weight.detach()[plan.cuts["0.weight"][0]])


def test_what_a_solver_cannot_do_is_said() -> None:
    model, data = linear_problem()
    plan = masked_plan(model, data[0][:, :6])
    with pytest.raises(pr.PruningError, match="damping"):
        pr.solvers.woodfisher(model, plan, data, loss=fit_loss, damping=0)
    with pytest.raises(pr.PruningError, match="iterable of batches"):
        pr.solvers.mfac(model, plan, data[0], loss=fit_loss)
    with pytest.raises(pr.PruningError, match="not positive definite"):
        pr.solvers.obs(model, plan, data, loss=lambda m, b: -fit_loss(m, b))
    wide = nn.Sequential(nn.Linear(100, 50))
    x = torch.randn(3, 100)
    big = pr.plan(wide, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    with pytest.raises(pr.PruningError, match="obs cannot take 0"):
        pr.solvers.obs(wide, big, [x], loss=square_loss)
