"""A convolution of one position in, one position out: the axis along which it runs can be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracle import check_exact
from torch import Tensor, nn

from prunella.graph.solve.groups import couple

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))


class Mixed(nn.Module):
    """Steps of a sequence are mixed by a convolution, whose positions are the channels of the layers around it."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(6, 8), mix, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mix(self.enter(x)).relu())  # type: ignore[no-any-return]


POINTWISE = {
    "one position": lambda: nn.Conv1d(5, 7, 1),
    "transposed": lambda: nn.ConvTranspose1d(5, 7, 1),
    "by groups": lambda: nn.Conv1d(5, 5, 1, groups=5),
    "two": lambda: nn.Sequential(nn.Conv1d(5, 9, 1), nn.GELU(), nn.Conv1d(9, 5, 1)),
}
SLIDING: dict[str, Any] = {
    "three positions": lambda: nn.Conv1d(5, 7, 3, padding=1),
    "a step of two": lambda: nn.Sequential(nn.Conv1d(5, 7, 1, stride=2), nn.Upsample(size=8)),
    "a border": lambda: nn.Sequential(nn.Conv1d(5, 7, 1, padding=1), nn.AdaptiveAvgPool1d(8)),
    "a border behind": lambda: nn.Sequential(nn.ConvTranspose1d(5, 7, 1, 2, output_padding=1), nn.AdaptiveAvgPool1d(8)),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_channels_pass_through(name: str) -> None:
    torch.manual_seed(0)
    checked = check_exact(Mixed(POINTWISE[name]()), X)
    small: Any = checked.small
    assert small.leave.in_features == small.enter.out_features < 8


@pytest.mark.parametrize("name", SLIDING)
def test_channels_stay_where_positions_move(name: str) -> None:
    torch.manual_seed(0)
    graph = couple(Mixed(SLIDING[name]()).eval(), X)
    assert not [group for group in graph.groups if group.name == "enter"]
    assert {f.reason for f in graph.frozen if f.entity == "enter.weight"} == {"a convolution slides along it"}


def test_an_image_passes_along_one_axis() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.Linear(8, 3))
    checked = check_exact(net, torch.randn(2, 4, 5, 6))
    small: Any = checked.small
    assert small[2].in_features == small[0].out_features < 8
