"""One table of statistics: an entry is all that a new one needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.registry.criterion import criterion
from prunella.registry.method import REGISTRY
from prunella.stats import STATISTICS, Statistic, Subject
from tests.graphs import convnet, images, square_loss

X = images()[0]
Count = Annotated[Tensor, "(units,)", "the number of each unit"]


class Numbers:
    """Counts the batches, and numbers the units of each group."""

    def __init__(self, subject: Subject) -> None:
        self.sizes, self.batches = {group.name: group.size for group in subject.groups}, 0

    def watch(self) -> AbstractContextManager[object]:
        return nullcontext()

    def add(self, grads: Mapping[str, Tensor]) -> None:
        assert grads
        self.batches += 1

    def result(self) -> dict[str, Tensor]:
        return {name: self.batches * torch.arange(size, dtype=torch.float64) for name, size in self.sizes.items()}


ENTRY = Statistic(kind=Count, level="unit", slot=Numbers, gradients=True, absent="and nothing counts")


def test_a_new_statistic_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATISTICS, "unit_count", ENTRY)
    monkeypatch.setattr("prunella.registry.method.REGISTRY", dict(REGISTRY))

    @criterion(source="test")
    def counted(unit_count: Tensor) -> Tensor:
        return unit_count

    recipe = pr.Recipe(counted)
    plan = pr.plan(convnet(), X, recipe, target=pr.Sparsity(0.5), data=[X, X], loss=square_loss)
    assert all(mask.equal(torch.arange(len(mask)) >= len(mask) // 2) for mask in plan.keep.values())
    with pytest.raises(pr.PruningError, match="counted needs `unit_count`: pass data= and loss="):
        pr.plan(convnet(), X, recipe, target=pr.Sparsity(0.5))
    with pytest.raises(pr.PruningError, match="scores units, not single weights"):
        masks = pr.Recipe(counted, pr.Element())
        pr.plan(convnet(), X, masks, target=pr.Sparsity(0.5), data=[X], loss=square_loss)


def test_a_name_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown statistic 'unit_count'"):
        criterion(source="test")(lambda unit_count: unit_count)

    def unregistered(unit_count: Tensor) -> Tensor:
        return unit_count

    with pytest.raises(pr.PruningError, match="asks for `unit_count`, which is not a statistic"):
        pr.plan(convnet(), X, pr.Recipe(unregistered), target=pr.Sparsity(0.5))


@pytest.mark.parametrize("name", STATISTICS)
def test_an_entry_says_its_shape_and_its_meaning(name: str) -> None:
    entry = STATISTICS[name]
    assert entry.shape and len(entry.meaning) > 10
    assert not (entry.slot and entry.compute) and (entry.slot or not entry.gradients)
