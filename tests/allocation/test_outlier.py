"""OWL: the mean is what was asked, no layer is further from it than allowed, layers with outliers keep more."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.allocation.pool import Pool


def pools() -> list[Pool]:
    torch.manual_seed(0)
    scores = [torch.rand(400), torch.rand(1000), torch.rand(200)]
    scores[1][:100] = 50.0
    scores[2][:4] = 50.0
    return [Pool(str(i), s.sort().values, (len(s) // 20, 20)) for i, s in enumerate(scores)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 10))
    with torch.no_grad():
        model[2].weight[:5] *= 30
    return model


def test_layers_with_outliers_keep_more_and_the_mean_is_exact() -> None:
    recipe = pr.Recipe(pr.magnitude, pr.Element(), partial(pr.allocation.owl, limit=0.1))
    plan = pr.plan(net(), torch.randn(2, 40), recipe, target=pr.Sparsity(0.7))
    assert plan.got == pytest.approx(0.7, abs=1e-4)
    shares = [1 - row.kept / row.total for row in plan.rows]
    assert max(abs(share - 0.7) for share in shares) == pytest.approx(0.1, abs=2e-3)
    assert shares[1] == min(shares)
    assert plan.recipe["allocation"]["name"] == "owl"


def test_ratios_by_hand() -> None:
    keys = pr.allocation.owl(pools(), m=5.0, limit=0.08)
    # Outliers: none of 400, 100 of 1000 (whose mean is about 5.5), 4 of 200.
    ratios, sizes = [0.0, 0.1, 0.02], [400, 1000, 200]
    mean = sum(r * n for r, n in zip(ratios, sizes, strict=True)) / 1600
    for key, ratio, size in zip(keys, ratios, sizes, strict=True):
        assert float(key[0] - 0.5 / size) == pytest.approx(0.08 * (ratio - mean) / mean, abs=1e-12)


def test_equal_layers_are_treated_alike_and_knobs_are_checked() -> None:
    same = [Pool(name, torch.ones(10), (2, 5)) for name in "ab"]
    assert all(key.equal(other) for key, other in zip(pr.allocation.owl(same), pr.uniform(same), strict=True))
    with pytest.raises(pr.PruningError, match="limit"):
        pr.allocation.owl(same, limit=1.0)
