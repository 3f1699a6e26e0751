"""Operations that move channels: bags of rows, patches and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import check_exact, frozen_because
from torch import Tensor, nn


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.EmbeddingBag(50, 16, mode=mode), nn.Linear(16, 24), nn.Linear(24, 2)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.first(self.table(ids, offsets)).relu())
        return out


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("flat", [False, True])
def test_columns_of_a_bag_of_rows_can_go_and_its_rows_stay(mode: str, flat: bool) -> None:
    ids = torch.arange(12) * 3 % 50
    inputs: Any = (ids, torch.tensor([0, 3, 7])) if flat else (ids.view(3, 4),)
    graph = check_exact(Bag(mode), inputs, count=False).graph
    assert {group.name: group.size for group in graph.groups} == {"table": 16, "first": 24}
    assert graph.numel("table.weight", {"table": torch.arange(16) < 4}) == 50 * 4


class Patches(nn.Module):
    """6 channels of 4x4, in patches of 2x2."""

    def __init__(self, how: Callable[[Patches, Tensor], Tensor], inputs: int) -> None:
        super().__init__()
        self.first, self.mix, self.how = nn.Conv2d(3, 6, 3, padding=1), nn.Conv1d(24, 24, 1), how
        self.head = nn.Linear(inputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.how(self, F.unfold(self.first(x), 2, stride=2)))
        return out


WAYS: dict[str, tuple[Callable[[Patches, Tensor], Tensor], int, set[int]]] = {
    "patches": (lambda model, y: y.transpose(1, 2), 24, {6}),
    "there and back": (lambda model, y: F.fold(y, (4, 4), 2, stride=2).flatten(2).transpose(1, 2), 6, {6}),
    "mixed and back": (
        lambda model, y: F.fold(model.mix(y), (4, 4), 2, stride=2).flatten(2).transpose(1, 2), 6, {6}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_patches_of_a_channel_go_with_it(name: str) -> None:
    how, inputs, sizes = WAYS[name]
    checked = check_exact(Patches(how, inputs), torch.randn(2, 3, 4, 4), count=False)
    assert {group.size for group in checked.graph.groups} == sizes
    assert len(checked.graph.groups) == (2 if name == "mixed and back" else 1)


def test_patches_along_channels_keep_them() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 6), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.unfold(self.first(x)[:, None], 2, stride=2).transpose(1, 2))
            return out

    graph = check_exact(Across(), torch.randn(2, 4, 5), count=False).graph
    assert frozen_because(graph, "first.weight", 0, "patches are taken along it")
