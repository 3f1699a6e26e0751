"""Shares that are stated, uniform+ and isomorphic, against numbers worked by hand."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunella as pr
from prunella.allocation.pool import Allocation, Pool
from prunella.planning.budget import allocate
from prunella.selection import shortest_prefix
from tests.graphs import IMAGE, convnet, images


def pool(size: int, name: str = "a", shape: tuple[int, ...] = (4, 4), scale: float = 1.0, topology: str = "") -> Pool:
    return Pool(name, scale * torch.arange(1.0, size + 1), shape, topology=topology)


def counts(pools: list[Pool], allocation: Allocation, total: int) -> tuple[int, ...]:
    found = shortest_prefix(allocate(pools, allocation), lambda taken: sum(taken) >= total)
    assert found is not None
    return found


# -- uniform+ --------------------


def test_uniform_plus_spares_the_first_convolution_and_bounds_the_last_layer() -> None:
    pools = [pool(10, "0", (2, 1, 3, 3)), pool(100, "1", (4, 2, 3, 3)), pool(50, "2")]
    assert counts(pools, pr.allocation.uniform_plus, 75) == (0, 50, 25)
    assert counts(pools, pr.allocation.uniform_plus, 130) == (0, 90, 40)  # 80 % of the last, the rest from between
    assert counts(pools, pr.allocation.uniform_plus, 145) == (0, 100, 45)  # more than the others can give
    assert counts(pools, pr.allocation.uniform_plus, 155) == (5, 100, 50)
    half = functools.partial(pr.allocation.uniform_plus, last=0.5)
    assert counts(pools, half, 100) == (0, 75, 25)


def test_uniform_plus_of_a_network_without_convolutions_bounds_the_last_layer_only() -> None:
    assert counts([pool(100), pool(100, "b")], pr.allocation.uniform_plus, 190) == (100, 90)
    assert counts([pool(100), pool(100, "b")], pr.allocation.uniform_plus, 100) == (50, 50)
    assert counts([pool(10)], pr.allocation.uniform_plus, 9) == (9,)
    with pytest.raises(pr.PruningError, match="fraction"):
        pr.allocation.uniform_plus([pool(3)], last=1.5)


def test_uniform_plus_in_a_plan_meets_the_total_exactly() -> None:
    plan = pr.plan(
        convnet(),
        torch.randn(IMAGE),
        pr.Recipe(granularity=pr.Element(), allocation=pr.allocation.uniform_plus),
        target=pr.Sparsity(0.4),
    )
    kept = {row.name: row.kept / row.total for row in plan.rows}
    total = sum(row.total for row in plan.rows)
    assert kept["0"] == 1 and kept["3"] == pytest.approx(kept["7"], abs=0.01)
    assert sum(row.total - row.kept for row in plan.rows) == round(0.4 * total)


# -- global, as in concept 52 --------------------


@given(st.integers(1, 30))
def test_scaling_a_layer_moves_the_global_split_as_computed(total: int) -> None:
    a, b = [1.5 * i for i in range(1, 17)], [10.0 * (2 * i - 1) for i in range(1, 17)]
    pools = [Pool("a", torch.tensor(a), (4, 4)), Pool("b", torch.tensor(b), (4, 4))]
    merged = sorted([(v, 0) for v in a] + [(v, 1) for v in b])[:total]
    assert counts(pools, pr.global_, total) == (sum(w == 0 for _, w in merged), sum(w == 1 for _, w in merged))


def test_the_floor_of_every_layer_is_honoured() -> None:
    recipe = pr.Recipe(granularity=pr.Element(), allocation=pr.global_, min_density=0.2)
    model = convnet()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)  # all of it would go first
    plan = pr.plan(model, torch.randn(IMAGE), recipe, target=pr.Sparsity(0.6))
    rows = {row.name: row for row in plan.rows}
    assert rows["3"].kept == -(-rows["3"].total // 5) and min(row.kept / row.total for row in plan.rows) >= 0.2
    assert plan.got == pytest.approx(0.6, abs=1e-3)


# -- isomorphic --------------------


def test_isomorphic_ranks_within_a_kind_and_takes_the_same_sparsity_from_every_kind() -> None:
    pools = [
        pool(4, "a", topology="conv"), pool(4, "b", topology="conv", scale=10),
        pool(8, "c", topology="head", scale=1e-6),
    ]  # fmt: skip
    assert counts(pools, pr.allocation.isomorphic, 8) == (
        4,
        0,
        4,
    )  # half of each kind, of the convolutions the small ones
    assert counts(pools, pr.global_, 8) == (0, 0, 8)


@given(st.integers(0, 16))
def test_isomorphic_of_one_kind_is_global_and_of_all_kinds_uniform(total: int) -> None:
    one = [pool(10, "a"), pool(6, "b", scale=2.5)]
    assert counts(one, pr.allocation.isomorphic, total) == counts(one, pr.global_, total)
    many = [pool(10, "a", topology="x"), pool(6, "b", scale=2.5, topology="y")]
    assert counts(many, pr.allocation.isomorphic, total) == counts(many, pr.uniform, total)


def test_groups_of_equal_structure_are_topology_whatever_their_width() -> None:
    from prunella.graph.solve.groups import couple
    from prunella.planning.candidates import CandidateUnits

    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6),
                          nn.Conv2d(6, 5, 3), nn.Conv2d(5, 2, 2)).eval()  # fmt: skip
    graph = couple(model, torch.randn(1, 3, 9, 9))
    groups = graph.groups
    candidates = CandidateUnits(graph, groups, tuple(torch.arange(float(g.size)) for g in groups), pr.Sparsity(0.5))
    kinds = {p.name: p.topology for p in candidates.pools}
    assert kinds["0"] == kinds["2"] != kinds["4"]


# -- fixed --------------------


def test_fixed_gives_the_stated_shares_and_scales_them_together() -> None:
    pools = [pool(10, "a"), pool(20, "b"), pool(5, "c")]
    stated = functools.partial(pr.allocation.fixed, shares={"a": 0.5, "b": 0.25})
    assert counts(pools, stated, 10) == (5, 5, 0)
    assert counts(pools, stated, 4) == (2, 2, 0)
    assert counts(pools, stated, 20) == (10, 10, 0)
    assert counts(pools, stated, 33) == (10, 20, 3)  # who is not named gives last
    assert counts(pools, pr.allocation.fixed, 7) == counts(pools, pr.uniform, 7)


def test_fixed_refuses_what_is_no_share() -> None:
    with pytest.raises(pr.PruningError, match="no group z"):
        pr.allocation.fixed([pool(3)], shares={"z": 0.5})
    with pytest.raises(pr.PruningError, match=r"share of a is 1\.5"):
        pr.allocation.fixed([pool(3)], shares={"a": 1.5})


def test_a_plan_file_knows_the_shares(tmp_path: Path) -> None:
    recipe = pr.Recipe(allocation=functools.partial(pr.allocation.fixed, shares={"0": 0.5, "3": 0.25}), round_to=2)
    plan = pr.plan(convnet(), images()[0], recipe, target=pr.Sparsity(0.4))
    back = pr.io.load_plan(pr.io.save_plan(plan, tmp_path / "a.plan"))
    assert back.recipe["allocation"] == {"name": "fixed", "knobs": {"shares": {"0": 0.5, "3": 0.25}}}
    again = pr.plan(convnet(), images()[0], pr.Recipe.read(back.recipe), target=pr.Sparsity(0.4))
    assert {k: v.tolist() for k, v in again.keep.items()} == {k: v.tolist() for k, v in plan.keep.items()}


# -- of a scan --------------------


def test_from_scan_cuts_every_group_to_the_same_loss() -> None:
    pools = [pool(100, "a"), pool(100, "b")]
    drops = {"a": [(0.5, 1.0), (1.0, 2.0)], "b": [(0.5, 0.25), (1.0, 0.5)]}
    allocation = functools.partial(pr.allocation.from_scan, drops=drops)
    assert counts(pools, allocation, 50) == (10, 40)  # loss 0.2 is 10 % of a and 40 % of b
    keys = allocation(pools)
    assert float(keys[0][49]) == pytest.approx(2 * 0.495) and float(keys[1][49]) == pytest.approx(0.5 * 0.495)


def test_from_scan_goes_on_beyond_the_last_point_and_never_falls() -> None:
    keys = pr.allocation.from_scan([pool(10)], drops={"a": [(0.2, 0.4), (0.4, 0.1), (0.6, 0.5)]})[0]
    assert bool((keys.diff() >= 0).all()) and float(keys[3]) == pytest.approx(0.3, abs=0.05)
    assert float(keys[9]) == pytest.approx(0.5 + 0.35 * 2, abs=1e-6)
