"""Exchanges of weights against brute force: the error is what the formula says, and no single exchange is left."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.granularity import NM, Block, Element
from prunella.solvers import refit, swap
from prunella.solvers.layer import relative_error
from tests.solvers.test_layer import layer, wanda


def error(weight: Tensor, gram: Tensor, mask: Tensor) -> float:
    return relative_error(weight, weight * mask, gram)


def best_exchange(weight: Tensor, gram: Tensor, mask: Tensor, m: int) -> float:
    """The least error of one row after any single exchange within groups of m."""
    least = error(weight, gram, mask)
    for i, j in itertools.product(range(mask.shape[1]), repeat=2):
        if i // m == j // m and not mask[0, i] and mask[0, j]:
            other = mask.clone()
            other[0, i], other[0, j] = True, False
            least = min(least, error(weight, gram, other))
    return least


@pytest.mark.parametrize("pattern", [Element(), Element(per_row=True), NM(2, 4), NM(1, 4), NM(2, 3, ragged=True)])
def test_the_error_falls_and_counts_stay(pattern: Element | NM) -> None:
    weight, gram = layer()
    before, found = wanda(weight, gram, pattern), swap(weight, gram, pattern)
    assert found.error < 0.95 * before.error
    assert found.mask.sum(1).equal(before.mask.sum(1))
    assert found.weight.equal(weight * found.mask)
    if isinstance(pattern, NM) and 32 % pattern.m == 0:
        assert bool((found.mask.view(12, -1, pattern.m).sum(-1) == pattern.n).all())
    errors = [swap(weight, gram, pattern, steps=steps).error for steps in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[0] < before.error


def alike(gram: Tensor) -> Tensor:
    """The same inputs with a large common part, so that what two weights do together counts."""
    scale = 4 * gram.diagonal().mean()
    return gram + scale * torch.ones_like(gram)


@pytest.mark.parametrize("seed", range(12))
def test_within_groups_the_best_exchange_of_all_is_taken(seed: int) -> None:
    weight, gram = layer(out=1, width=12, seed=seed)
    gram = alike(gram) if seed > 3 else gram
    start = wanda(weight, gram, NM(2, 4)).mask
    one = swap(weight, gram, NM(2, 4), start=start, steps=1)
    assert one.error == pytest.approx(best_exchange(weight, gram, start, 4), rel=1e-9)
    end = swap(weight, gram, NM(2, 4), steps=100)
    assert end.error == pytest.approx(best_exchange(weight, gram, end.mask, 4), rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_in_a_row_the_partner_of_the_one_that_returns_is_the_best(seed: int) -> None:
    weight, gram = layer(out=1, width=10, seed=seed)
    gram = alike(gram) if seed > 3 else gram
    start = wanda(weight, gram).mask
    alone = {i: error(weight, gram, start | (torch.arange(10) == i)) for i in range(10) if not start[0, i]}
    back = min(alone, key=alone.__getitem__)
    options = []
    for j in start[0].nonzero().flatten().tolist():
        other = start.clone()
        other[0, back], other[0, j] = True, False
        options.append(error(weight, gram, other))
    found = swap(weight, gram, start=start, steps=1)
    assert found.error == pytest.approx(min(*options, error(weight, gram, start)), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(2, 10, 2, 2), (3, 9, 3, 1), (1, 11, 1, 3), (3, 10, 4, 3)])
def test_blocks_are_exchanged_whole(shape: tuple[int, int, int, int], seed: int) -> None:
    """One step in one row of blocks, the last one ragged in some: the best to return, then its best partner."""
    out, width, rows, cols = shape
    weight, gram = layer(out=out, width=width, seed=seed)
    gram = alike(gram) if seed > 3 else gram
    start = wanda(weight, gram, Block(rows, cols)).mask
    spans = [slice(k, k + cols) for k in range(0, width, cols)]

    def after(back: slice, away: slice | None = None) -> float:
        other = start.clone()
        other[:, back] = True
        if away is not None:
            other[:, away] = False
        return error(weight, gram, other)

    back = min((span for span in spans if not start[0, span.start]), key=after)
    least = min(after(back, away) for away in spans if start[0, away.start])
    found = swap(weight, gram, Block(rows, cols), start=start, steps=1)
    assert found.error == pytest.approx(min(least, error(weight, gram, start)), rel=1e-9)


def test_rows_of_blocks_do_not_touch_each_other() -> None:
    weight, gram = layer()
    whole = swap(weight, gram, Block(4, 2))
    starts = wanda(weight, gram, Block(4, 2)).mask
    assert whole.error < 0.97 * error(weight, gram, starts)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = swap(weight[rows], gram, Block(4, 2), start=starts[rows])
        assert alone.mask.equal(whole.mask[rows]) and bool((alone.mask.sum(1) == starts[rows].sum(1)).all())


def test_on_inputs_that_do_not_correlate_wanda_stays() -> None:
    weight, gram = layer()
    gram = torch.diag(gram.diagonal())
    start = wanda(weight, gram, Element(per_row=True)).mask
    assert swap(weight, gram, Element(per_row=True)).mask.equal(start)


def test_a_refit_afterwards_gains_and_what_does_not_fit_is_refused() -> None:
    weight, gram = layer(out=24, width=64)
    found = swap(weight, gram, Element(per_row=True))
    before = wanda(weight, gram, Element(per_row=True))
    assert refit(weight, gram, found.mask).error < refit(weight, gram, before.mask).error < before.error
    for wrong in (
        lambda: swap(weight, gram, Block(2, 2), start=before.mask),
        lambda: swap(weight, gram, steps=0),
        lambda: swap(weight, gram, start=torch.ones(2, 2, dtype=torch.bool)),
    ):
        with pytest.raises(pr.PruningError):
            wrong()
