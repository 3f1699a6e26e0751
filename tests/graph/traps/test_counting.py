"""Multiply-adds from the real geometry; what is not counted is listed."""

from __future__ import annotations

import pytest
import torch
from tests.oracle import (
    check_exact,
    macs,
)
from tests.zoo import odd
from torch import Tensor, nn

from prunella.graph.solve.groups import couple

CONVOLUTIONS = [
    (nn.Conv2d(1, 6, 5), (1, 1, 28, 28), 86_400),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), 2 * 5 * 5 * 6 * 4 * 9),
    (nn.Conv2d(4, 6, 3, dilation=2), (1, 4, 9, 9), 5 * 5 * 6 * 4 * 9),
    (nn.Conv2d(4, 8, 3, groups=2, padding=1), (1, 4, 6, 6), 6 * 6 * 8 * 2 * 9),
    (nn.Conv2d(4, 4, (3, 1), groups=4), (1, 4, 6, 6), 4 * 6 * 4 * 3),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 4),
    (nn.Conv1d(3, 5, 4, padding=2), (2, 3, 10), 2 * 11 * 3 * 5 * 4),
    (nn.Linear(6, 5), (2, 7, 6), 2 * 7 * 6 * 5),
]


@pytest.mark.parametrize(("layer", "shape", "wanted"), CONVOLUTIONS)
def test_multiply_adds_come_from_the_real_geometry(layer: nn.Module, shape: tuple[int, ...], wanted: int) -> None:
    model = nn.Sequential(layer)
    graph = couple(model.eval(), torch.randn(shape))
    assert graph.macs() == wanted == sum(x.macs for x in graph.layers)
    assert macs(model, torch.randn(shape)) == wanted


def test_multiply_adds_of_attention_are_counted() -> None:
    graph = check_exact(odd.AttentionBlock(), torch.randn(2, 5, 16)).graph
    products = sum(cost.macs({}) for cost in graph.costs if not cost.layer)
    assert products == 2 * (2 * 4 * 5 * 5 * 4)
    assert graph.macs() == products + 2 * 5 * (4 * 16 * 16 + 2 * 16 * 24 + 16 * 3)


class Uncounted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(self.first(x), dim=0).real
        return self.last(x) + torch.cdist(x, x)[:, :1]


def test_operations_that_are_not_counted_are_listed() -> None:
    graph = couple(Uncounted().eval(), torch.randn(3, 6))
    assert any("fft" in name for name in graph.uncounted) and any("cdist" in name for name in graph.uncounted)
    assert all(count == 1 for count in graph.uncounted.values())
