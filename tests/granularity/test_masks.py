"""Patterns hold in every block, ties are exact, and coarser patterns keep less."""

from __future__ import annotations

import pytest
import torch

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element


def test_element_zeros_are_exact_with_ties() -> None:
    scores = torch.zeros(7, 9)
    mask = Element().mask(scores, 20)
    assert (~mask).sum() == 20 and mask.flatten()[:43].all()


def test_rows_lose_the_same_number_each() -> None:
    scores = torch.randn(6, 10).abs() * torch.arange(1.0, 7).unsqueeze(1)
    assert Element(per_row=True).mask(scores, 4).sum(1).tolist() == [6] * 6
    assert len(set(Element().mask(scores, 24).sum(1).tolist())) > 1


def test_row_steps_score_the_mean_of_the_rth_smallest() -> None:
    scores = torch.tensor([[3.0, 1.0], [10.0, 20.0]])
    assert Element(per_row=True).ranked(scores).tolist() == [5.5, 11.5]


def test_ragged_blocks_are_filled_with_zeros_and_counted_as_they_are() -> None:
    scores = torch.ones(3, 5)
    scores[2, 4] = 0.5
    block = Block(2, 2)
    assert block.ranked(scores).tolist() == [0.5, 2, 2, 2, 4, 4]
    assert block.freed(scores).tolist() == [1, 3, 5, 7, 11, 15]  # type: ignore[union-attr]
    mask = block.mask(scores, 1)
    assert mask.shape == (3, 5) and (~mask).nonzero().tolist() == [[2, 4]]


@pytest.mark.parametrize("removed", [0, 1, 7, 11, 12])
def test_what_a_block_pattern_frees_is_what_its_mask_zeroes(removed: int) -> None:
    torch.manual_seed(0)
    scores, block = torch.randint(0, 3, (7, 10)).float(), Block(3, 3)
    freed = block.freed(scores)
    assert isinstance(freed, torch.Tensor) and len(freed) == 12
    assert int((~block.mask(scores, removed)).sum()) == (int(freed[removed - 1]) if removed else 0)


def test_blocks_are_whole() -> None:
    mask = Block(2, 4).mask(torch.randn(8, 16), 9)
    tiles = mask.view(4, 2, 4, 4).sum((1, 3))
    assert set(tiles.flatten().tolist()) == {0, 8}


def test_nm_keeps_n_of_every_m_the_first_of_equal_ones() -> None:
    mask = NM(2, 4).mask(torch.randn(6, 8))
    assert (mask.view(6, 2, 4).sum(-1) == 2).all()
    assert NM(2, 4).mask(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]
    assert NM(1, 4).mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("bad", [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_nm_that_is_no_pattern_is_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="not a pattern"):
        NM(*bad)


def test_empty_blocks_are_refused() -> None:
    with pytest.raises(RequestError, match="no weights"):
        Block(0, 4)


def test_kept_magnitude_falls_from_fine_to_coarse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 32).abs()
    fine, vector = Element().mask(weight, 256), Block(1, 4).mask(weight, 64)
    block, rows = Block(4, 4).mask(weight, 16), Block(4, 32).mask(weight, 2)
    nm = NM(2, 4).mask(weight)
    assert {int(mask.sum()) for mask in (fine, vector, block, rows, nm)} == {256}
    kept = [float(weight[mask].sum()) for mask in (fine, vector, block, rows)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert float(weight[nm].sum()) <= kept[0]
