"""Sparsities from spectra: Hill's estimate by hand, the mean exactly, heavy tails pruned less."""

from __future__ import annotations

import math

import pytest
import torch

import prunella as pr
from prunella.llm.alpha import tail_exponent
from tests.llm.test_blockwise import Half, Net, batches, net


def test_hill_by_hand() -> None:
    weight = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))  # eigenvalues 64, 16, 4, 1: k = 2, compared with 4
    assert tail_exponent(weight) == pytest.approx(1 + 2 / (math.log(16) + math.log(4)))
    assert tail_exponent(torch.eye(6)) == math.inf
    assert tail_exponent(torch.zeros(3, 5)) == math.inf
    assert tail_exponent(3 * weight) == pytest.approx(tail_exponent(weight))


def heavy() -> Net:
    """Three blocks, the second with a few directions that carry it."""
    model = net()
    with torch.no_grad():
        for layer in (model.blocks[1].up, model.blocks[1].down):  # type: ignore[union-attr]
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(left @ torch.diag(values * 2.0 ** -torch.arange(len(values))) @ right)
    return model


def test_heavy_tails_are_pruned_less_and_the_mean_is_the_sparsity() -> None:
    model, x = heavy(), batches()[0]
    found = pr.llm.alpha_sparsities(model, x, sparsity=0.6, spread=0.2)
    assert set(found) == {f"blocks.{k}.{part}" for k in range(3) for part in ("up", "down")}
    sizes = {name: model.get_submodule(name).weight.numel() for name in found}
    assert sum(found[n] * sizes[n] for n in found) / sum(sizes.values()) == pytest.approx(0.6, abs=1e-12)
    low, high = min(found.values()), max(found.values())
    assert found["blocks.1.up"] == found["blocks.1.down"] == low
    assert high / low == pytest.approx(1.2 / 0.8)
    means = [sum(tail_exponent(getattr(b, part).weight.detach()) for part in ("up", "down")) for b in model.blocks]
    middle = sorted(range(3), key=means.__getitem__)[1]
    part = (means[middle] - min(means)) / (max(means) - min(means))
    assert found[f"blocks.{middle}.up"] == pytest.approx(low + part * (high - low))


def test_it_is_what_solve_takes() -> None:
    model, x = heavy(), batches()[0]
    done = pr.llm.solve_(
        model, x, pr.llm.OneShot(sparsity=pr.llm.alpha_sparsities(model, x, sparsity=0.6)), data=batches()
    )
    assert done.sparsity == pytest.approx(0.6, abs=2e-3)
    assert len({fit.removed / fit.total for fit in done.fits if not fit.skipped}) > 1
    assert pr.llm.alpha_sparsities(model, x, sparsity=0.6, skip=["blocks.0"]).keys().isdisjoint(["blocks.0.up"])


def test_equal_blocks_are_treated_alike_and_too_much_is_refused() -> None:
    model, x = net(), batches()[0]
    for block in model.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
        assert isinstance(block, Half)
    assert set(pr.llm.alpha_sparsities(model, x, sparsity=0.5).values()) == {0.5}
    for wrong in ({"sparsity": 1.0}, {"spread": -0.1}, {"sparsity": 0.95, "spread": 0.3}, {"skip": ["blocks"]}):
        with pytest.raises(pr.PruningError):
            pr.llm.alpha_sparsities(heavy(), x, **wrong)  # type: ignore[arg-type]
