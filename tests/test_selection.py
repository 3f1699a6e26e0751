"""Exact selection, against the plainest possible implementations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunella.selection import _from_ordinal, _ordinal, keep_top, removal_order, shortest_prefix

few = st.integers(-2, 2).map(float)


@given(st.lists(few, min_size=1, max_size=12), st.data())
def test_keep_top_is_a_stable_sort_by_falling_score(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    first = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert keep_top(torch.tensor(values), k).nonzero().flatten().tolist() == sorted(first)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_all_equal_scores_keep_exactly_k_at_the_lowest_index(value: float) -> None:
    kept = keep_top(torch.full((1000,), value), 137)
    assert kept.sum() == 137 and kept[:137].all()


def test_rows_are_selected_on_their_own() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 9.0]])
    assert keep_top(scores, 2).tolist() == [[True, False, True, False], [True, False, False, True]]


def test_k_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot keep 5 of 4"):
        keep_top(torch.zeros(4), 5)


@given(st.lists(few, min_size=1, max_size=12), st.data())
def test_dropping_in_removal_order_leaves_the_top(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    left = torch.ones(len(values), dtype=torch.bool)
    left[removal_order(scores)[: len(values) - k]] = False
    assert left.equal(keep_top(scores, k))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.1, 2.0]), max_size=6), min_size=1, max_size=4), st.data())
def test_shortest_prefix_is_the_brute_force_merge(lists: list[list[float]], data: st.DataObject) -> None:
    lists = [sorted(values) for values in lists]
    costs = data.draw(st.lists(st.integers(1, 3), min_size=len(lists), max_size=len(lists)))
    budget = data.draw(st.integers(0, sum(c * len(v) for c, v in zip(costs, lists, strict=True)) + 1))
    order = sorted((key, -group) for group, values in enumerate(lists) for key in values)
    expected = None
    for steps in range(len(order) + 1):
        counts = [sum(1 for _, g in order[:steps] if -g == group) for group in range(len(lists))]
        if sum(c * n for c, n in zip(costs, counts, strict=True)) >= budget:
            expected = tuple(counts)
            break
    ladders = [torch.tensor(values, dtype=torch.float64) for values in lists]
    found = shortest_prefix(ladders, lambda counts: sum(c * n for c, n in zip(costs, counts, strict=True)) >= budget)
    assert found == expected


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_ordinals_keep_the_order_of_floats(a: float, b: float) -> None:
    assert (a < b) == (_ordinal(a) < _ordinal(b))
    assert _from_ordinal(_ordinal(a)) == a
