"""Allocations against numbers worked by hand, brute force, and the promises of their docstrings."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunella as pr
from prunella.allocation.pool import Allocation, Pool
from prunella.errors import RequestError
from prunella.planning.budget import allocate, ladder, removed, solve
from prunella.selection import shortest_prefix

LENET = [(300, 784), (100, 300), (10, 100)]
RESNET20 = [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3), *[(32, 32, 3, 3)] * 5,
            (64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]  # fmt: skip


def pool(values: list[float], name: str = "a", shape: tuple[int, ...] | None = None) -> Pool:
    return Pool(name, torch.tensor(sorted(values), dtype=torch.float64), shape or (len(values), 1))


def counts(pools: list[Pool], allocation: Allocation, total: int) -> tuple[int, ...]:
    found = shortest_prefix(allocate(pools, allocation), lambda taken: sum(taken) >= total)
    assert found is not None
    return found


@pytest.mark.parametrize(("sparsity", "expected"), [(0.9, (0.07957, 0.23019, 1.0)), (0.98, (0.01539, 0.04453, 0.3674))])
def test_erk_on_lenet_300_100(sparsity: float, expected: tuple[float, ...]) -> None:
    assert pr.allocation.erk_densities(LENET, 1 - sparsity) == pytest.approx(expected, rel=3e-4)


def test_erk_on_resnet_20() -> None:
    found = pr.allocation.erk_densities(RESNET20, 0.1)
    assert [found[i] for i in (0, 1, 7, 8, 13, 14, 19)] == pytest.approx(
        [1, 0.3026, 0.2150, 0.1394, 0.1015, 0.0667, 1], abs=6e-5
    )
    sizes = [math.prod(shape) for shape in RESNET20]
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(0.1, rel=1e-12)


def test_erk_densities_of_one_keep_all() -> None:
    assert pr.allocation.erk_densities(LENET, 1.0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.98])
def test_erk_keys_give_the_densities_and_the_exact_total(sparsity: float) -> None:
    shapes = [(30, 78), (10, 30), (5, 10)]
    pools = [Pool(str(i), torch.zeros(math.prod(s)), s) for i, s in enumerate(shapes)]
    size = sum(p.size for p in pools)
    taken = counts(pools, pr.allocation.erk, round(sparsity * size))
    assert sum(taken) == round(sparsity * size)
    for count, p, density in zip(taken, pools, pr.allocation.erk_densities(shapes, 1 - sparsity), strict=True):
        assert abs((p.size - count) - density * p.size) <= 1


def test_uniform_gives_the_same_fraction_whatever_the_scores() -> None:
    pools = [pool([1e6 + i for i in range(100)]), pool([float(i) for i in range(40)], "b")]
    assert counts(pools, pr.uniform, 70) == (50, 20)


def test_global_follows_the_scores_and_scaling_a_layer_moves_the_split() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5]
    assert counts([pool(a), pool(b, "b")], pr.global_, 4) == (2, 2)
    assert counts([pool(a), pool([10 * v for v in b], "b")], pr.global_, 4) == (4, 0)


def test_global_per_cost_compares_the_harm_for_each_thing_saved() -> None:
    pools = [
        Pool("head", torch.tensor([30.0, 90.0]), (4, 4), cost=60.0),
        Pool("neuron", torch.tensor([1.0, 2.0]), (2, 4)),
    ]
    assert [key.tolist() for key in pr.global_(pools, per_cost=True)] == [[0.5, 1.5], [1.0, 2.0]]
    assert counts(pools, functools.partial(pr.global_, per_cost=True), 1) == (1, 0)
    assert counts(pools, pr.global_, 1) == (0, 1)


@pytest.mark.parametrize(
    "normalize", [mode for mode in pr.allocation.Normalize if mode is not pr.allocation.Normalize.NONE]
)
def test_normalized_global_does_not_see_scale(normalize: pr.allocation.Normalize) -> None:
    a, b = [1.0, 2.0, 3.0, 4.5], [1.5, 2.5, 3.25, 4.0]

    def allocation(pools: list[Pool]) -> list[torch.Tensor]:
        return pr.global_(pools, normalize=normalize)

    plain = counts([pool(a), pool(b, "b")], allocation, 3)
    assert plain == counts([pool(a), pool([10 * v for v in b], "b")], allocation, 3)


def test_normalization_divides_by_what_it_says() -> None:
    values = [1.0, 3.0, 8.0]
    scales = {
        pr.allocation.Normalize.MEAN: 4.0,
        pr.allocation.Normalize.MAX: 8.0,
        pr.allocation.Normalize.NORM: math.sqrt(74),
        pr.allocation.Normalize.RMS: math.sqrt(74 / 3),
    }
    for normalize, by in scales.items():
        assert pr.global_([pool(values)], normalize=normalize)[0].tolist() == pytest.approx([v / by for v in values])


def test_standard_scores_have_mean_zero_and_deviation_one() -> None:
    found = pr.global_([pool([1.0, 3.0, 8.0]), pool([5.0, 5.0], "b")], normalize=pr.allocation.Normalize.STANDARD)
    deviation = math.sqrt((9 + 1 + 16) / 3)
    assert found[0].tolist() == pytest.approx([-3 / deviation, -1 / deviation, 4 / deviation])
    assert found[1].tolist() == [0.0, 0.0]
    with pytest.raises(RequestError, match="cannot be compared per cost"):
        pr.global_([pool([1.0, 3.0])], normalize=pr.allocation.Normalize.STANDARD, per_cost=True)


def test_lamp_by_hand() -> None:
    keys = pr.allocation.lamp([pool([1.0, 2.0, 3.0])])[0]
    assert keys.tolist() == pytest.approx([1 / 14, 4 / 13, 1.0])


@given(st.lists(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=5), min_size=2, max_size=3), st.data())
def test_lamp_is_the_greedy_smallest_relative_distortion(layers: list[list[float]], data: st.DataObject) -> None:
    layers = [sorted({v + i / 7 + g / 100 for i, v in enumerate(values)}) for g, values in enumerate(layers)]
    total = data.draw(st.integers(0, sum(len(v) for v in layers)))
    left = [list(values) for values in layers]
    for _ in range(total):
        cost = [v[0] ** 2 / sum(x * x for x in v) if v else math.inf for v in left]
        left[cost.index(min(cost)) if cost.count(min(cost)) == 1 else len(cost) - 1 - cost[::-1].index(min(cost))].pop(
            0
        )
    assert counts([pool(v, str(i)) for i, v in enumerate(layers)], pr.allocation.lamp, total) == tuple(
        len(full) - len(rest) for full, rest in zip(layers, left, strict=True)
    )


def test_lamp_empties_no_layer_before_the_others_are_at_their_last_weight() -> None:
    pools = [pool([1e-6 * i for i in range(1, 50)]), pool([1e3 * i for i in range(1, 80)], "b"), pool([0.0] * 5, "c")]
    assert counts(pools, pr.allocation.lamp, 131) == (48, 78, 5)


def test_lamp_keeps_precision_over_many_orders_of_magnitude() -> None:
    keys = pr.allocation.lamp([pool([1e-30, 1e-25, 1e-3, 1.0])])[0]
    assert keys[-1] == 1 and keys[2].item() == pytest.approx(1e-6, rel=1e-4) and 0 < keys[0] < keys[1]


def test_lamp_refuses_negative_scores() -> None:
    with pytest.raises(pr.PruningError, match="non-negative"):
        pr.allocation.lamp([pool([-1.0, 2.0])])


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 9))
def test_ladder_widths_are_aligned_and_never_below_min_density(size: int, min_density: float, round_to: int) -> None:
    made = ladder(torch.arange(size, dtype=torch.float64), min_density, round_to)
    widths = [size - made.removed(step) for step in range(len(made.keys) + 1)]
    assert widths[0] == size
    assert all(width % round_to == 0 for width in widths[1:])
    assert all(width >= max(1, math.ceil(min_density * size - 1e-9)) for width in widths)
    assert size < round_to or widths[-1] < max(1, math.ceil(min_density * size - 1e-9)) + round_to
    assert bool((made.keys.diff() >= 0).all())


def test_alignment_at_high_ratios_leaves_one_multiple_and_does_not_prune_nothing() -> None:
    made = ladder(pr.uniform([pool([float(i) for i in range(20)])])[0], 0.0, 8)
    assert [20 - made.removed(step) for step in range(len(made.keys) + 1)] == [20, 16, 8]
    assert solve([made], lambda pruned: pruned[0] >= 12) == (12,)
    assert removed([made], (1,)) == (4,)


def test_an_allocation_that_breaks_its_promise_is_named() -> None:
    with pytest.raises(pr.PruningError, match="no order of removal"):
        allocate([pool([1.0, 2.0])], lambda pools: [torch.tensor([2.0, 1.0], dtype=torch.float64)])
