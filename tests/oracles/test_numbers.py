"""Criteria against numbers worked by hand, and the facts that the concepts list."""

from __future__ import annotations

import pytest
import torch

import prunella as pr

W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -4.0]])


def test_magnitude() -> None:
    assert pr.magnitude(W).tolist() == [[1, 2, 0.5], [0, 3, 4]]
    assert pr.magnitude(W, p=2).tolist() == [[1, 4, 0.25], [0, 9, 16]]
    assert pr.magnitude(-W).equal(pr.magnitude(W))
    with pytest.raises(pr.PruningError, match="p=1 or p=2"):
        pr.magnitude(W, p=3)


@pytest.mark.parametrize("fill", ["random", "ties", "equal", "zero"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.99])
def test_single_weights_go_exactly_whatever_the_weights_are(fill: str, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(23, 17)
    values = torch.randn(17, 23, generator=generator)
    made = {"random": values, "ties": values.round(), "equal": torch.ones(17, 23), "zero": torch.zeros(17, 23)}[fill]
    with torch.no_grad():
        layer.weight.copy_(made)
    recipe = pr.Recipe(pr.magnitude, pr.Element())
    mask = pr.plan(layer, torch.ones(1, 23), recipe, target=pr.Sparsity(sparsity)).masks["weight"]
    pruned = int((~mask).sum())
    assert pruned == round(sparsity * 17 * 23)
    if 0 < pruned < mask.numel():
        assert float(made[mask].abs().min()) >= float(made[~mask].abs().max())


def test_group_norm() -> None:
    assert pr.criteria.group_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), normalize=False).tolist() == [5, 0]
    assert pr.criteria.group_norm(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(5 / 2**0.5)
    assert pr.criteria.group_norm(torch.tensor([[3.0, -4.0]]), p=1).item() == pytest.approx(3.5)


def test_normalized_group_norm_does_not_see_the_size_of_the_group() -> None:
    small, large = torch.full((1, 4), 0.3), torch.full((1, 400), 0.3)
    assert pr.criteria.group_norm(small).item() == pytest.approx(pr.criteria.group_norm(large).item())
    assert pr.criteria.group_norm(small, normalize=False) < pr.criteria.group_norm(large, normalize=False)


def test_taylor_averages_squares_over_batches() -> None:
    gates = torch.tensor([[1.0, -3.0], [-1.0, 5.0]])
    assert pr.taylor(gates).tolist() == [1, 17]


def test_taylor_sq() -> None:
    assert pr.criteria.taylor_sq(W, torch.full((2, 3), 2.0)).tolist() == [[2, 8, 0.5], [0, 18, 32]]


def test_geometric_median_of_points_on_a_line() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [6.0, 8.0]])
    assert pr.criteria.geometric_median(rows).tolist() == pytest.approx([25, 15, 15, 15])


def test_a_duplicate_goes_before_a_distinct_filter_of_small_norm() -> None:
    big = torch.tensor([5.0, 5.0, 5.0])
    rows = torch.stack([big, big + 1e-9, torch.tensor([-0.1, 0.1, 0.0]), torch.tensor([5.0, -5.0, 9.0])])
    assert pr.criteria.geometric_median(rows).argmin() in (0, 1)
    assert rows.norm(dim=1).argmin() == 2


def test_wanda() -> None:
    assert pr.wanda(W, torch.tensor([2.0, 1.0, 0.0])).tolist() == [[2, 2, 0], [0, 3, 0]]


def test_ria_is_the_share_of_the_row_plus_that_of_the_column() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 1.0]])
    wanted = [[1 / 4 + 1, 3 / 4 + 3 / 4], [0, 1 + 1 / 4]]
    assert pr.criteria.ria(weight, torch.ones(2)).tolist() == wanted
    louder = pr.criteria.ria(weight, torch.tensor([4.0, 9.0]))
    assert louder.tolist() == [[2 * wanted[0][0], 3 * wanted[0][1]], [0, 3 * wanted[1][1]]]
    assert pr.criteria.ria(weight, torch.tensor([4.0, 9.0]), a=0.0).tolist() == wanted
    assert pr.criteria.ria(torch.zeros(2, 2), torch.ones(2)).tolist() == [[0, 0], [0, 0]]


def test_bn_scale_is_the_scale() -> None:
    assert pr.criteria.bn_scale(torch.tensor([0.5, 0.0])).tolist() == [0.5, 0]


def test_row_wise_wanda_with_unit_norms_is_row_wise_magnitude() -> None:
    scores = torch.randn(5, 8).abs()
    pattern = pr.Element(per_row=True)
    mask = pattern.mask(pr.wanda(scores, torch.ones(8)), 3)
    assert mask.equal(pattern.mask(pr.magnitude(scores), 3)) and mask.sum(1).tolist() == [5] * 5
