"""Which weights read a pruned axis, and what recovery does with those that are read in several ways."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella as pr
from prunella.recovery.readers import Reader, Skipped, readers_of
from tests.hand import hand_plan

KEPT = torch.tensor([0, 2, 3])
Operation = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A layer of six units, and one weight that reads them in some way."""

    def __init__(self, operation: Operation, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.operation, self.weight = nn.Linear(4, 6), operation, nn.Parameter(torch.randn(shape))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(torch.relu(self.first(x)), self.weight)


def found(operation: Operation, *shape: int, axis: int = 1) -> list[Reader | Skipped]:
    model = Net(operation, *shape)
    cuts = {"first.weight": {0: KEPT}, "first.bias": {0: KEPT}, "weight": {axis: KEPT}}
    plan = hand_plan(cuts=cuts)
    masked = pr.apply_(copy.deepcopy(model), plan)
    with torch.no_grad():
        return readers_of(masked, model, torch.randn(7, 4, dtype=torch.float64), plan, None)


def test_row_blocks_are_parts_of_their_own() -> None:
    (reader,) = found(lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], -1), 4, 6)
    assert isinstance(reader, Reader) and len(reader.parts) == 2 and reader.order == (0, 1)
    columns = [submatrix.columns for part in reader.parts for submatrix in part.submatrices]
    assert [positions.tolist() for positions in columns] == [KEPT.tolist()] * 2  # type: ignore[union-attr]


def test_a_weight_that_is_read_twice_in_one_way_is_one_part() -> None:
    (reader,) = found(lambda x, w: F.linear(x, w) + x.square() @ w.t() + torch.einsum("ti,oi->to", x, w), 5, 6)
    assert isinstance(reader, Reader) and len(reader.parts) == 1 and reader.order == (0, 0, 0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, w: F.linear(x, w) + F.linear(x, w[:3]).sum(),  # rows of it again
        lambda x, w: F.linear(F.linear(x, w), w.t()),  # and back
        lambda x, w: F.linear(x, w) + (F.linear(x, w) @ w).sum(),
    ],
)
def test_parts_that_overlap_are_left_alone(operation: Operation) -> None:
    assert found(operation, 5, 6) == [Skipped("weight", "it is used in two different ways")]


def test_groups_that_lose_channels_are_matrices_of_their_own() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv1d(2, 6, 1), nn.ConvTranspose1d(6, 4, 2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    model = Grouped().double()
    kept = torch.tensor([0, 2, 3, 5])
    plan = hand_plan(cuts={"first.weight": {0: kept}, "first.bias": {0: kept}, "second.weight": {0: kept}})
    x = torch.randn(3, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        (reader,) = readers_of(pr.apply_(copy.deepcopy(model), plan), model, x, plan, None)
    assert isinstance(reader, Reader) and reader.biased
    columns = [submatrix.columns.tolist() for submatrix in reader.parts[0].submatrices]  # type: ignore[union-attr]
    assert columns == [[0, 1, 4, 5], [0, 1, 4, 5]]


def test_means_behind_a_transposed_convolution() -> None:
    """The mean of each output channel is that of the dense model again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 3, 3, stride=2, padding=1)).double()
    x = torch.randn(5, 2, 9, dtype=torch.float64)
    plan = pr.plan(model, x, pr.Recipe(pr.magnitude), target=pr.Sparsity(0.5))
    small = pr.shrink(model, plan)
    gap = (small(x) - model(x)).mean((0, 2)).abs().max()
    (fold,) = pr.recovery.fold_means(small, model, [x], plan).folds
    assert not fold.skipped and gap > 0.01
    torch.testing.assert_close(small(x).mean((0, 2)), model(x).mean((0, 2)), rtol=1e-9, atol=1e-9)


def test_statistics_of_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, stride=2)).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    plan = pr.plan(model, x, pr.Recipe(pr.magnitude), target=pr.Sparsity(0.5))
    small = pr.shrink(model, plan)
    assert pr.recovery.correct_statistics(small, model, [x], plan=plan) == ("0", "2")
    for moment in (torch.mean, torch.var):
        torch.testing.assert_close(moment(small(x), (0, 2, 3)), moment(model(x), (0, 2, 3)), rtol=1e-3, atol=1e-3)
