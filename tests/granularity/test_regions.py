"""`Regions`: weights with one label go together, as blocks do where the labels are blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10)).eval()


X = torch.randn(2, 3, 6, 6)


def tiles(shape: tuple[int, ...]) -> Tensor:
    """Labels of 2x3 blocks of the matrix, from 7 up and with gaps."""
    rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
    down, across = torch.arange(rows) // 2, torch.arange(columns) // 3
    return (7 + 5 * (down[:, None] * 1000 + across)).reshape(shape)


@pytest.mark.parametrize("allocation", [pr.uniform, pr.global_])
def test_labels_of_blocks_give_the_masks_of_blocks(allocation: object) -> None:
    masks = [
        pr.plan(net(), X, pr.Recipe(pr.magnitude, pattern, allocation), target=pr.Sparsity(0.6)).masks  # type: ignore[arg-type]
        for pattern in (pr.granularity.Regions(tiles), pr.Block(2, 3))
    ]
    assert masks[0].keys() == masks[1].keys() and all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_units_of_unequal_size_go_whole_lowest_sums_first() -> None:
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[5.0, 0.5, 0.5, 0.5, 4.0]])
    labels = torch.tensor([[0, 1, 1, 1, 2]])
    recipe = pr.Recipe(pr.magnitude, pr.granularity.Regions(lambda shape: labels))
    for removed, kept in ((0.6, [1, 0, 0, 0, 1]), (0.8, [1, 0, 0, 0, 0])):
        mask = pr.plan(layer, torch.ones(1, 5), recipe, target=pr.Sparsity(removed)).masks["weight"]
        assert mask.int().tolist() == [kept]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2).long(), torch.zeros(6, 3, 3, 3), "labels"])
def test_labels_that_are_none(wrong: object) -> None:
    recipe = pr.Recipe(pr.magnitude, pr.granularity.Regions(lambda shape: wrong))  # type: ignore[arg-type,return-value]
    with pytest.raises(RequestError, match="a whole number for each weight"):
        pr.plan(net(), X, recipe, target=pr.Sparsity(0.5))
