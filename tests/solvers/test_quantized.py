"""Pruning and rounding together against each of them alone, and against columns done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.granularity import NM, Block, Element
from prunella.solvers import Grid, prune_and_quantize, sparsegpt
from prunella.solvers.layer import relative_error
from tests.solvers.test_layer import layer


def by_hand(weight: Tensor, gram: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    """The best change of all later columns after each column is fixed: OBS by the inverse of what is left."""
    left = weight.clone()
    for column in range(weight.shape[1]):
        kept = torch.where(mask[:, column], (left[:, column] / step).round() * step, 0.0)
        inverse = torch.linalg.inv(gram[column:, column:])
        lost = left[:, column] - kept
        left[:, column:] -= lost[:, None] / inverse[0, 0] * inverse[0]
        left[:, column] = kept
    return left


@pytest.mark.parametrize("pattern", [Element(), Element(per_row=True), NM(2, 4)])
@pytest.mark.parametrize("bits", [8, 4])
def test_counts_are_exact_and_all_is_on_the_grid(pattern: Element | NM, bits: int) -> None:
    weight, gram = layer()
    for group in (None, 8):
        found = prune_and_quantize(weight, gram, pattern, grid=Grid(bits, group))
        assert int((~found.mask).sum()) == weight.numel() // 2
        assert not bool(found.weight[~found.mask].any())
        assert found.scale.shape == (12, 32 // (group or 32))
        assert int(found.codes.abs().max()) <= 2 ** (bits - 1) - 1
        wide = found.scale.repeat_interleave(group or 32, 1)
        assert torch.allclose(found.codes * wide, found.weight, rtol=1e-12, atol=1e-12)
        assert found.error == pytest.approx(relative_error(weight, found.weight, gram))


def roomy(out: int, width: int) -> tuple[Tensor, Tensor]:
    """A layer whose first weights are so large that no other outgrows the largest code while it makes up for errors."""
    weight, gram = layer(out, width)
    weight[:, 0] = 30
    return weight, gram + gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def test_on_an_endlessly_fine_grid_it_is_sparsegpt() -> None:
    weight, gram = roomy(12, 32)
    for pattern in (Element(), NM(2, 4)):
        found, other = prune_and_quantize(weight, gram, pattern, grid=Grid(24)), sparsegpt(weight, gram, pattern)
        assert found.mask.equal(other.mask) and torch.allclose(found.weight, other.weight, atol=1e-4)
        assert found.error == pytest.approx(other.error, rel=1e-4)


def test_without_sparsity_each_error_is_made_up_for_by_all_columns_to_come() -> None:
    weight, gram = roomy(5, 12)
    found = prune_and_quantize(weight, gram, sparsity=0.0, grid=Grid(8), damping=0.0, block=5)
    step = weight.abs().amax(1) / 127
    wanted = by_hand(weight, gram, torch.ones_like(weight, dtype=torch.bool), step)
    assert torch.allclose(found.weight, wanted, atol=1e-9) and bool(found.mask.all())
    plain = (weight / step[:, None]).round() * step[:, None]
    assert found.error < relative_error(weight, plain, gram)


def test_zeros_and_rounding_are_made_up_for_alike() -> None:
    weight, gram = roomy(5, 12)
    found = prune_and_quantize(weight, gram, NM(2, 4), grid=Grid(8), damping=0.0)
    wanted = by_hand(weight, gram, found.mask, weight.abs().amax(1) / 127)
    assert torch.allclose(found.weight, wanted, atol=1e-9)


def test_jointly_is_better_than_one_after_the_other() -> None:
    weight, gram = layer(out=24, width=64)
    for bits in (4, 3):
        joint = prune_and_quantize(weight, gram, grid=Grid(bits))
        pruned = sparsegpt(weight, gram).weight
        after = Grid(bits).round(pruned, Grid(bits).scale(pruned))
        assert joint.error < relative_error(weight, after, gram)


def test_finer_scales_lose_less_and_what_does_not_fit_is_refused() -> None:
    weight, gram = layer(out=24, width=64)
    weight[:, :8] *= 20
    by = [prune_and_quantize(weight, gram, grid=Grid(4, group)).error for group in (None, 8)]
    assert by[1] < by[0]
    for wrong in (
        lambda: Grid(1),
        lambda: Grid(8, 0),
        lambda: prune_and_quantize(weight, gram, sparsity=1.0),
        lambda: prune_and_quantize(weight, gram, block=0),
    ):
        with pytest.raises(pr.PruningError):
            wrong()


def test_blocks_go_whole_and_the_rest_is_on_the_grid() -> None:
    weight, gram = layer(out=24, width=64)
    found = prune_and_quantize(weight, gram, Block(4, 2), grid=Grid(8, 16))
    tiles = found.mask.view(6, 4, 32, 2)
    assert bool((tiles == tiles[:, :1, :, :1]).all()) and int((~found.mask).sum()) == 24 * 32
    assert torch.allclose(found.codes * found.scale.repeat_interleave(16, 1), found.weight)
    assert bool((found.codes[~found.mask] == 0).all())
    apart = sparsegpt(weight, gram, Block(4, 2))
    assert apart.error < found.error < 1.1 * apart.error


def test_a_model_is_pruned_and_rounded_block_by_block() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    data = [torch.randn(40, 16) for _ in range(2)]
    done = pr.llm.solve_(model, data[0], pr.llm.OneShot(pr.NM(2, 4), method=prune_and_quantize), data=data)
    assert done.sparsity == 0.5
    for layer_ in (model[0], model[2]):
        assert max(len(row.unique()) for row in layer_.weight.abs()) <= 128
