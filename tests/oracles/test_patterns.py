"""Granularities of masks against definitions and brute force: the ladder, kernel patterns, blocks, N:M, its order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.granularity.kernel import library
from prunella.transform.permute import PermutedReader, best_order

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def convolutions(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3))


def kept(
    model: nn.Sequential,
    granularity: pr.Element | pr.granularity.Vector | pr.granularity.Kernel | pr.granularity.Filter,
) -> tuple[int, float]:
    plan = pr.plan(model, IMAGE, pr.Recipe(granularity=granularity), target=pr.Sparsity(0.5))
    weights = dict(model.named_parameters())
    total = sum(float(weights[n].detach().double().abs()[m].sum()) for n, m in plan.masks.items())
    return sum(int(m.sum()) for m in plan.masks.values()), total


@pytest.mark.parametrize("seed", range(3))
def test_kept_magnitude_never_rises_from_fine_to_vector_to_kernel_to_filter(seed: int) -> None:
    granularities = (pr.Element(), pr.granularity.Vector(), pr.granularity.Kernel(), pr.granularity.Filter())
    counts, sums = zip(*(kept(convolutions(seed), granularity) for granularity in granularities), strict=True)
    assert set(counts) == {(4 * 12 * 9 + 12 * 12 * 9) // 2}
    assert list(sums) == sorted(sums, reverse=True) and len(set(sums)) == 4


def test_units_of_a_kernel_layer_are_rows_kernels_and_filters() -> None:
    model = convolutions()
    for granularity, axes in (
        (pr.granularity.Vector(), (3,)),
        (pr.granularity.Kernel(), (2, 3)),
        (pr.granularity.Filter(), (1, 2, 3)),
    ):
        mask = pr.plan(model, IMAGE, pr.Recipe(granularity=granularity), target=pr.Sparsity(0.5)).masks["2.weight"]
        assert mask.all(axes[0]).shape and bool((mask.float().mean(axes).frac() == 0).all()) and not mask.all()


def test_units_of_a_linear_layer_are_runs_weights_and_rows() -> None:
    assert pr.granularity.Vector(3).on((5, 8)) == pr.Block(1, 3)
    assert pr.granularity.Vector().on((12, 4, 5, 3)) == pr.Block(1, 3)
    assert pr.granularity.Kernel().on((5, 8)) == pr.Block(1, 1)
    assert pr.granularity.Filter().on((5, 8)) == pr.Block(1, 8)
    assert pr.granularity.Vector(3).on((5, 8, 1, 1)) == pr.Block(1, 3)
    with pytest.raises(RequestError, match="has no weights"):
        pr.granularity.Vector(0)


def test_a_filter_mask_leaves_bias_and_shapes_where_a_channel_takes_all() -> None:
    model = convolutions()
    plan = pr.plan(model, IMAGE, pr.Recipe(granularity=pr.granularity.Filter()), target=pr.Sparsity(0.5))
    assert plan.masks.keys() == {"0.weight", "2.weight"} and not plan.cuts
    assert pr.plan(model, IMAGE, target=pr.Sparsity(0.5)).cuts.keys() >= {"0.bias", "2.weight"}


def test_every_kernel_keeps_four_entries_in_one_of_eight_shapes_that_keeps_the_largest_norm() -> None:
    model = convolutions()
    plan = pr.plan(model, IMAGE, pr.Recipe(granularity=pr.granularity.KernelPattern()))
    masks = {name: mask.reshape(-1, 9) for name, mask in plan.masks.items()}
    used = torch.cat(list(masks.values())).unique(dim=0)
    assert all(bool((mask.sum(1) == 4).all()) for mask in masks.values())
    assert len(used) <= 8 and bool(used[:, 4].all())
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        cells = weights[name].detach().reshape(-1, 9).double()
        norms = torch.stack([(cells * shape).norm(dim=1) for shape in used], 1)
        assert torch.allclose((cells * mask).norm(dim=1), norms.max(1).values)
    assert plan.got == pytest.approx(5 / 9)


def test_the_library_is_of_the_most_frequent_natural_shapes() -> None:
    def kernel(*high: int) -> Tensor:
        return torch.zeros(9).index_fill_(0, torch.tensor(high), 1.0)

    often, once, twice = kernel(0, 1, 2), kernel(6, 7, 8), kernel(3, 5, 7)
    shapes = library([torch.stack([often, once, often]), torch.stack([twice, often, twice])], 4, 2)
    assert [row.nonzero().flatten().tolist() for row in shapes] == [[0, 1, 2, 4], [3, 4, 5, 7]]


def test_a_kernel_pattern_refuses_other_kernels_and_scores_with_a_sign() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 5))
    with pytest.raises(RequestError, match="not 3x3"):
        pr.plan(model, IMAGE, pr.Recipe(granularity=pr.granularity.KernelPattern()))
    with pytest.raises(RequestError, match="non-negative"):
        pr.granularity.KernelPattern().masks([-torch.ones(2, 9)])
    with pytest.raises(RequestError, match="not a pattern"):
        pr.granularity.KernelPattern(9)


@pytest.mark.filterwarnings("ignore:Sparse BSR")
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (3, 3)])
def test_a_product_with_stored_blocks_equals_the_dense_product_with_ragged_edges(rows: int, cols: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(10, 13), torch.randn(13, 6)
    block = pr.Block(rows, cols)
    steps = len(block.ranked(weight.abs())) // 2
    masked = weight * block.mask(weight.abs(), steps)
    assert not masked.isnan().any() and 0 < int((masked == 0).sum()) < masked.numel()
    padded = nn.functional.pad(masked, (0, -13 % cols, 0, -10 % rows))
    stored = padded.to_sparse_bsr((rows, cols))
    assert len(stored.values()) == len(block.ranked(weight.abs())) - steps
    product = stored @ nn.functional.pad(x, (0, 0, 0, -13 % cols))
    assert torch.allclose(product[:10], masked @ x, atol=1e-5)


def test_ragged_nm_keeps_n_of_every_whole_group_and_fills_the_last() -> None:
    mask = pr.NM(2, 4, ragged=True).mask(torch.arange(11.0).repeat(3, 1) - 20)
    assert mask.shape == (3, 11)
    assert mask[0].tolist() == [False, False, True, True] * 2 + [False, True, True]
    model = nn.Sequential(nn.Linear(7, 3))
    with pytest.raises(RequestError, match="does not fit"):
        pr.plan(model, torch.randn(1, 7), pr.Recipe(granularity=pr.NM(2, 4)))
    plan = pr.plan(model, torch.randn(1, 7), pr.Recipe(granularity=pr.NM(2, 4, ragged=True)))
    assert int(plan.masks["0.weight"].sum()) == 3 * 4


def brute_force(matrix: Tensor, n: int, m: int) -> float:
    """The most that any order of 2 m columns keeps."""
    found = []
    for rest in itertools.combinations(range(1, 2 * m), m - 1):
        sides = ([0, *rest], [i for i in range(2 * m) if i not in (0, *rest)])
        found.append(sum(float(matrix[:, side].topk(n, -1).values.double().sum()) for side in sides))
    return max(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_eight_columns_equals_brute_force(seed: int) -> None:
    matrix = torch.rand(12, 8, generator=torch.Generator().manual_seed(seed))
    order, before, after = best_order([PermutedReader(matrix, torch.arange(8).view(8, 1), 4)], pr.NM(2, 4), 8, 5, 0)
    pairs = [matrix[:, order[:4]], matrix[:, order[4:]]]
    assert after == pytest.approx(brute_force(matrix, 2, 4)) and after >= before
    assert after == pytest.approx(sum(float(p.topk(2, -1).values.sum()) for p in pairs), rel=1e-6)
    assert sorted(order.tolist()) == list(range(8))


def blocks(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("pattern", [pr.NM(2, 4), pr.NM(1, 2), pr.NM(4, 8)])
def test_a_permuted_network_computes_the_same_and_keeps_at_least_as_much(pattern: pr.NM) -> None:
    model = blocks().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = pr.transform.permute(model, IMAGE, pattern, seed=3)
    assert torch.allclose(found.model(IMAGE), model(IMAGE), atol=1e-6) and found.orders
    assert found.after > found.before
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    recipe = pr.Recipe(granularity=pattern)
    totals = []
    for net in (model, found.model):
        plan = pr.plan(net, IMAGE, recipe, skip=["0"])
        weights = dict(net.named_parameters())
        totals.append(sum(float(weights[n].detach().abs()[m].sum()) for n, m in plan.masks.items()))
    assert totals[1] - totals[0] == pytest.approx(found.after - found.before, rel=1e-3)
    again = pr.transform.permute(model, IMAGE, pattern, seed=3)
    assert all(order.equal(again.orders[name]) for name, order in found.orders.items())


def test_groups_that_may_not_move_are_named_with_the_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    found = pr.transform.permute(model, IMAGE, pr.NM(2, 4))
    assert torch.allclose(found.model(IMAGE), model(IMAGE), atol=1e-6)
    assert "2" in dict(found.left) and "fewer than two stripes" in dict(found.left)["2"]
    with pytest.raises(RequestError, match="rounds=0"):
        pr.transform.permute(model, IMAGE, pr.NM(2, 4), rounds=0)
