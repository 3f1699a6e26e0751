"""A statistic of the user's, and names that are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.registry.criterion import criterion
from prunella.stats import STATISTICS, Subject

KIND = Annotated[Tensor, "(out, in)", "the number of its row"]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """The table is as before afterwards."""
    known = dict(STATISTICS)
    yield
    STATISTICS.clear()
    STATISTICS.update(known)


def rows(subject: Subject) -> dict[str, Tensor]:
    """Row numbers, in the shape of each weight."""
    shapes = {name: subject.parameters[name] for name in subject.scored}
    return {name: torch.arange(len(value)).float()[:, None].expand(value.shape) for name, value in shapes.items()}


def test_a_criterion_gets_what_was_registered() -> None:
    pr.criteria.register_statistic("row_number", pr.criteria.Statistic(kind=KIND, compute=rows))

    def by_row(row_number: Tensor) -> Tensor:
        return row_number

    plan = pr.plan(nn.Linear(8, 4), torch.ones(1, 8), pr.Recipe(by_row, pr.Element()), target=pr.Sparsity(0.5))
    assert plan.masks["weight"].tolist() == [[False] * 8] * 2 + [[True] * 8] * 2


def test_names_that_cannot_be_given() -> None:
    made = pr.criteria.Statistic(kind=KIND, compute=rows)
    for name, said in (("weight", "there already"), ("two words", "parameter of a function")):
        with pytest.raises(RequestError, match=said):
            pr.criteria.register_statistic(name, made)
    with pytest.raises(RequestError, match="neither compute= nor slot="):
        pr.criteria.register_statistic("nothing", pr.criteria.Statistic(kind=KIND))


def test_a_misspelt_statistic_is_named_with_near_names() -> None:
    layer, x = nn.Linear(8, 4), torch.ones(1, 8)

    def misspelt(weigth: Tensor) -> Tensor:
        return weigth.abs()

    with pytest.raises(RequestError, match="asks for `weigth`, which is not a statistic") as caught:
        pr.plan(layer, x, pr.Recipe(misspelt, pr.Element()), target=pr.Sparsity(0.5))
    assert caught.value.why.startswith("did you mean weight")
    with pytest.raises(TypeError, match="unknown statistic 'weigth'; did you mean weight"):
        criterion(source="none")(misspelt)
