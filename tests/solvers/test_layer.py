"""Layer solvers against closed forms, brute force and each other."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.granularity import NM, Block, Element
from prunella.solvers import Solved, admm, alps, by_score, refit, sparsegpt
from prunella.solvers.layer import project, relative_error
from prunella.solvers.linalg import damped_factor, damped_solve
from prunella.solvers.refit import exact

Solve = Callable[..., Solved]


def layer(out: int = 12, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, a few of them much louder than the rest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, width, generator=generator, dtype=torch.float64) @ mix
    inputs[:, ::7] *= 5
    return weight, inputs.T @ inputs


def wanda(weight: Tensor, gram: Tensor, pattern: Element | NM | Block = Element(), *, sparsity: float = 0.5) -> Solved:  # noqa: B008
    return by_score(weight, gram, pattern, sparsity=sparsity, score=pr.wanda)


SOLVERS: dict[str, Solve] = {"wanda": wanda, "sparsegpt": sparsegpt, "admm": admm, "alps": alps}
solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


@solver
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9])
def test_exactly_so_many_go_also_with_ties(solve: Solve, sparsity: float) -> None:
    weight, gram = layer()
    weight = weight.round()  # many equal ones, as in dequantized weights
    found = solve(weight, gram, sparsity=sparsity)
    assert int((~found.mask).sum()) == round(sparsity * weight.numel())
    assert bool((found.weight[~found.mask] == 0).all())
    rows = solve(weight, gram, Element(per_row=True), sparsity=sparsity)
    assert (~rows.mask).sum(1).tolist() == [round(sparsity * 32)] * 12


@solver
def test_n_of_every_m_stay(solve: Solve) -> None:
    weight, gram = layer()
    for n, m in ((2, 4), (1, 4), (4, 8)):
        mask = solve(weight, gram, NM(n, m)).mask
        assert mask.view(-1, m).sum(1).tolist() == [n] * (mask.numel() // m)


@solver
def test_the_inputs_are_left_as_they_are_and_the_result_repeats(solve: Solve) -> None:
    weight, gram = layer()
    before = weight.clone(), gram.clone()
    first, again = solve(weight, gram), solve(weight, gram)
    assert weight.equal(before[0]) and gram.equal(before[1])
    assert first.weight.equal(again.weight) and first.mask.equal(again.mask)
    assert first.error == pytest.approx(relative_error(weight, first.weight, gram), rel=1e-9)


def test_sparsegpt_on_uncorrelated_inputs_is_magnitude_in_each_block_and_moves_nothing() -> None:
    weight, _ = layer()
    found = sparsegpt(weight, 3 * torch.eye(32, dtype=torch.float64), block=8)
    for start in range(0, 32, 8):
        part = slice(start, start + 8)
        assert found.mask[:, part].equal(Element().mask(weight[:, part].abs(), 48))
    assert torch.allclose(found.weight, weight * found.mask, rtol=1e-12)


def test_sparsegpt_with_one_block_and_one_weight_to_go_is_obs() -> None:
    weight, gram = layer(out=1, width=6)
    found = sparsegpt(weight, gram, sparsity=1 / 6, damping=0.0)
    pruned = int((~found.mask[0]).nonzero())
    inverse = torch.linalg.inv(gram[pruned:, pruned:])  # columns before it are fixed already
    costs = [float(weight[0, q] ** 2 / torch.linalg.inv(gram[q:, q:])[0, 0]) for q in range(6)]
    assert pruned == min(range(6), key=costs.__getitem__)
    wanted = weight[0].clone()
    wanted[pruned:] -= weight[0, pruned] / inverse[0, 0] * inverse[:, 0]
    assert torch.allclose(found.weight[0], wanted * found.mask[0], rtol=1e-8)
    assert relative_error(weight, found.weight, gram) == pytest.approx(
        min(costs) / float((weight @ gram * weight).sum()), rel=1e-6
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_least_squares_is_never_worse_and_the_orders_hold(sparsity: float) -> None:
    weight, gram = layer(out=24, width=64)
    by = {name: solve(weight, gram, sparsity=sparsity) for name, solve in SOLVERS.items()}
    assert by["alps"].error < by["admm"].error < by["sparsegpt"].error < by["wanda"].error
    for found in by.values():
        best = relative_error(weight, exact(weight, gram, found.mask), gram)
        short = refit(weight, gram, found.mask, start=found.weight)
        assert best <= found.error * (1 + 1e-5) and short.error <= found.error * (1 + 1e-5)
        assert bool((short.weight[~found.mask] == 0).all())
    settled = relative_error(weight, exact(weight, gram, by["admm"].mask), gram)
    assert by["admm"].error < 1.1 * settled


def test_conjugate_gradients_reach_the_exact_minimum() -> None:
    weight, gram = layer()
    mask = wanda(weight, gram).mask
    found = refit(weight, gram, mask, steps=200)
    assert torch.allclose(found.weight, exact(weight, gram, mask), rtol=1e-6, atol=1e-9)
    errors = [refit(weight, gram, mask, steps=steps).error for steps in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


def test_the_exact_refit_is_where_no_kept_weight_can_improve() -> None:
    weight, gram = layer()
    mask = wanda(weight, gram).mask
    found = exact(weight, gram, mask, damping=0.0)
    slope = (found - weight) @ gram
    assert float(slope[mask].abs().max()) < 1e-9 * float((weight @ gram).abs().max())


@pytest.mark.parametrize("pattern", [Element(), NM(2, 4)])
def test_an_edge_found_by_a_sample_costs_no_error(pattern: Element | NM, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(out=96, width=128)
    exact_edges = admm(weight, gram, pattern).error
    monkeypatch.setattr(sys.modules["prunella.solvers.admm"], "SAMPLE", 3000)
    found = admm(weight, gram, pattern)
    assert exact_edges < 0.9 * sparsegpt(weight, gram, pattern).error
    assert found.error < 1.03 * exact_edges and int((~found.mask).sum()) == 96 * 64


def test_blocks_of_one_are_weights() -> None:
    weight, gram = layer()
    one, other = sparsegpt(weight, gram, Block(1, 1)), sparsegpt(weight, gram)
    assert one.mask.equal(other.mask) and one.weight.equal(other.weight)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (5, 3), (12, 4)])
def test_column_by_column_blocks_that_cost_least_go(shape: tuple[int, int]) -> None:
    weight, gram = layer()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    # What a weight costs, given the columns before it: w^2 / inv(H of the columns from it on), its first entry.
    given = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(32)])
    pattern = Block(*shape)
    found = sparsegpt(weight, gram, pattern, block=32)
    assert found.mask.equal(project(weight.square() / given, pattern, 0.5))
    # In spans the share is met over all of them, at most one block over.
    for sparsity in (0.3, 0.5, 0.8):
        mask = sparsegpt(weight, gram, pattern, sparsity=sparsity, block=8).mask
        assert 0 <= int((~mask).sum()) - round(sparsity * 384) < shape[0] * shape[1]
        blocks = [block for rows in mask.split(shape[0]) for block in rows.split(shape[1], 1)]
        assert all(bool((block == block[0, 0]).all()) for block in blocks)
    assert found.error < by_score(weight, gram, pattern, score=lambda w, n: w.square() / given).error


def test_blocks_and_patterns_that_do_not_fit_are_refused() -> None:
    weight, gram = layer()
    mask = admm(weight, gram, Block(4, 1), sparsity=0.5).mask
    assert bool((mask.view(3, 4, 32).sum(1) % 4 == 0).all())
    for wrong in (
        lambda: sparsegpt(weight, gram[:3, :3]),
        lambda: admm(weight, gram, NM(3, 7)),
        lambda: admm(weight, gram, sparsity=1.0),
        lambda: admm(weight, gram * torch.nan),
        lambda: refit(weight, gram, torch.ones(2, 2, dtype=torch.bool)),
    ):
        with pytest.raises(pr.PruningError):
            wrong()


@solver
def test_a_singular_matrix_is_damped_and_says_so(solve: Solve, caplog: pytest.LogCaptureFixture) -> None:
    weight, gram = layer()
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0  # an input that is always zero
    gram[6], gram[:, 6] = gram[7].clone(), gram[:, 7].clone()
    found = solve(weight, gram)
    assert bool(torch.isfinite(found.weight).all())
    if solve is not wanda:
        with caplog.at_level("WARNING"):
            assert solve(weight, gram, damping=0.0).damping > 0
        assert "of 32 inputs is singular: damping" in caplog.text
        assert not bool(found.mask[:, 5].any())  # what multiplies nothing goes first


def test_a_factor_is_that_of_the_damped_matrix() -> None:
    _, gram = layer()
    factor, damping = damped_factor(gram, 0.1)
    wanted = gram + 0.1 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    assert damping == 0.1 and torch.allclose(factor @ factor.T, wanted)
    assert damped_factor(torch.zeros(3, 3), 0.1)[0].equal(torch.eye(3))
    assert not damped_solve(torch.zeros(3, 3), torch.ones(3, 2), 0.1)[0].any()


def test_blocks_go_until_the_sparsity_is_reached() -> None:
    scores = torch.arange(24.0).view(4, 6)
    assert int((~project(scores, Block(2, 2), 0.5)).sum()) == 12
    assert int((~project(scores, Block(2, 2), 0.4)).sum()) == 12
    assert int((~project(scores, Block(2, 2), 0.0)).sum()) == 0


def test_the_width_of_a_block_changes_nothing_where_only_columns_that_choose_together_matter() -> None:
    weight, gram = layer()
    one, whole = (sparsegpt(weight, gram, NM(2, 4), block=block) for block in (4, 32))
    assert one.mask.equal(whole.mask) and torch.allclose(one.weight, whole.weight, rtol=1e-9, atol=1e-12)


def test_a_score_sees_norms_not_their_squares() -> None:
    weight = torch.tensor([[3.0, 1.0, 1.0, 0.1]])
    gram = torch.diag(torch.tensor([1.0, 4.0, 16.0, 1.0]))  # norms 1, 2, 4, 1: products 3, 2, 4, 0.1
    found = wanda(weight, gram, sparsity=0.5)
    assert found.mask.tolist() == [[True, False, True, False]]
    assert found.error == pytest.approx((1 * 4 + 0.01) / (9 + 4 + 16 + 0.01))


@pytest.mark.parametrize("pattern", [Element(), Element(per_row=True), NM(2, 4), Block(2, 2)])
def test_the_growing_penalty_ends_in_least_squares_on_its_mask(pattern: Element | NM | Block) -> None:
    weight, gram = layer(out=24, width=64)
    found, other = alps(weight, gram, pattern), admm(weight, gram, pattern)
    assert found.error < 1.02 * other.error
    best = relative_error(weight, exact(weight, gram, found.mask), gram)
    assert found.error < 1.05 * best
    assert int(found.mask.sum()) == int(other.mask.sum()) == weight.numel() // 2


def test_alternating_to_the_end_is_the_best_mask_of_a_small_layer() -> None:
    weight, gram = layer(out=1, width=8)
    masks = [torch.tensor(bits).bool()[None] for bits in itertools.product((0, 1), repeat=8) if sum(bits) == 4]
    errors = sorted(relative_error(weight, exact(weight, gram, mask, damping=1e-6), gram) for mask in masks)
    found = alps(weight, gram, damping=1e-6)
    assert errors[0] * (1 - 1e-6) <= found.error <= errors[len(errors) // 20] * (1 + 1e-6)


@solver
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e37])
@pytest.mark.parametrize("pattern", [Element(), NM(2, 4)])
def test_dead_tiny_and_huge_inputs_give_finite_weights(solve: Solve, scale: float, pattern: Element | NM) -> None:
    """A dead layer has a zero Gram matrix: magnitude decides, and no output is lost."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 16, generator=generator) for rows in (8, 4))
    solved = solve(weight, inputs.T @ inputs * scale, pattern, sparsity=0.5)
    assert bool(torch.isfinite(solved.weight).all()) and 0 <= solved.error < 1
    assert int((~solved.mask).sum()) == 64 and bool((solved.weight[~solved.mask] == 0).all())
    if not scale:
        by_magnitude = by_score(weight, torch.eye(16), pattern, sparsity=0.5, score=lambda w, n: w.abs())
        assert solved.error == 0
        assert solve not in (admm, sparsegpt) or bool((solved.mask == by_magnitude.mask).all())
