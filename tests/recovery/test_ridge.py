"""The ridge that held-out batches choose, and tokens that are padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.model.observed_reads import Read
from prunella.model.watch import Watch
from prunella.recovery.least_squares import Sums
from prunella.recovery.reconstruct import RIDGES
from prunella.stats.elimination import FEW, TOKENS, Covariance, chosen_tokens, spread


class Tokens(nn.Module):
    """Two layers at each position; the mask changes nothing in them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(self.up(x).relu())


def _cut(data: Any) -> tuple[nn.Module, nn.Module, pr.Plan]:
    torch.manual_seed(0)
    dense = Tokens().double().eval()
    plan = pr.plan(dense, data[0], target=pr.MACs(0.5))
    return dense, pr.shrink(dense, plan), plan


def _padded(count: int, garbage: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1]])).long()
    batches = []
    for _ in range(count):
        x = torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)
        batches.append({"x": torch.where(mask[..., None] > 0, x, garbage + 9 * x), "attention_mask": mask})
    return batches


@pytest.mark.parametrize("ridge", [1e-3, "auto"])
def test_padding_decides_nothing(ridge: Any) -> None:
    weights = []
    for garbage in (0.0, 1e3):
        data = _padded(6, garbage)
        dense, small, plan = _cut(data)
        fitted = pr.reconstruct(small, dense, data, plan, ridge=ridge)
        assert fitted.fits[0].tokens == 6 * 16
        weights.append(small.down.weight.detach().clone())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-9)
    real = [batch["x"][batch["attention_mask"] > 0] for batch in _padded(6, 0.0)]
    dense, small, plan = _cut(real)
    pr.reconstruct(small, dense, real, plan, ridge=ridge)
    torch.testing.assert_close(small.down.weight, weights[0], rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


def test_padding_scores_nothing() -> None:
    recipe = pr.Recipe(criterion=pr.criteria.obs_units)
    keeps = []
    for garbage in (0.0, 1e3):
        data = _padded(4, garbage)
        dense, _, _ = _cut(data)
        keeps.append(pr.plan(dense, data[0], recipe, data=data, target=pr.MACs(0.5)).keep["up"])
    assert torch.equal(keeps[0], keeps[1])


def _noisy(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_auto_errs_less_on_new_data_than_a_small_ridge_with_few_tokens() -> None:
    data, new = _noisy(4), _noisy(60)[4:]

    def error(ridge: Any) -> float:
        dense, small, plan = _cut(data)
        pr.reconstruct(small, dense, data, plan, ridge=ridge)
        with torch.no_grad():
            return float(sum((dense(x) - small(x)).square().sum() for x in new))

    assert error("auto") < error(1e-9)


def _sums(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, generator=generator, dtype=torch.float64) + 3
    return x, torch.randn(tokens, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("centered", [True, False])
def test_sums_of_both_parts_are_the_sums_of_all_tokens(centered: bool) -> None:
    (x, y), (x2, y2) = _sums(20, 0), _sums(30, 1)
    first, every = Sums(centered=centered), Sums(centered=centered)
    first.add(x, y, y)
    second = first.empty()
    second.add(x2, y2, y2)
    for part in ((x, y), (x2, y2)):
        every.add(*part, part[1])
    both, all_at_once = (first + second).solve(1e-3), every.solve(1e-3)
    torch.testing.assert_close(both.change, all_at_once.change)
    torch.testing.assert_close(both.shift, all_at_once.shift)
    assert both.after == pytest.approx(all_at_once.after) and (first + second).tokens == 50


def test_the_chosen_ridge_is_the_best_on_the_tokens_held_out() -> None:
    x, y = _sums(8, 0)
    fit = Sums(centered=True)
    fit.add(x, y, y)
    held_out = fit.empty()
    x2, _ = _sums(40, 2)
    held_out.add(x2, x2[:, :2], x2[:, :2] * 0.1)
    errors = [held_out.error(fit.solve(ridge)) for ridge in RIDGES]
    chosen = fit.chosen(held_out, RIDGES)
    best = (fit + held_out).solve(RIDGES[errors.index(min(errors))])
    expected = best.change if min(errors) < held_out.squares else torch.zeros_like(best.change)
    assert torch.equal(chosen.change, expected)


def test_nothing_changes_where_no_ridge_helps() -> None:
    (x, y), (x2, _) = _sums(12, 0), _sums(40, 2)
    fit = Sums(centered=True)
    fit.add(x, y, y + 5)
    held_out = fit.empty()
    zero = torch.zeros(40, 2, dtype=torch.float64)
    held_out.add(x2, zero, zero)  # already exact there
    chosen = fit.chosen(held_out, RIDGES)
    assert not bool(chosen.change.any()) and not bool(chosen.shift.any()) and chosen.after == chosen.before


def test_many_tokens_are_spread_evenly() -> None:
    assert spread(FEW, 4) is None and spread(TOKENS * 1000, 1000) is None
    places = spread(65536, 9)
    assert places is not None and len(places) == FEW and len(places.unique()) == FEW
    assert torch.bincount(places // 4096, minlength=16).min() > 200  # in all parts
    assert torch.bincount(places % 64, minlength=64).min() > 40  # in all columns of an image
    layer, reads, covariance = nn.Linear(9, 2), list[Read](), Covariance(centered=True)
    watch = Watch([layer.weight], reads.append)
    with torch.no_grad(), watch:
        layer(torch.randn(65536, 9) + 100)
    watch.finish()
    chosen = chosen_tokens(reads[0], None)
    assert chosen is not None and torch.equal(chosen, places)
    covariance.add(reads[0].columns_at(chosen))
    assert covariance.tokens == FEW
    padded = chosen_tokens(reads[0], torch.arange(65536) % 2 == 0)
    assert padded is not None and len(padded) == FEW and not bool((padded % 2).any())
    torch.testing.assert_close(covariance.gram / FEW, torch.eye(9).double(), rtol=0.2, atol=0.1)
