"""Guesses of sizes cost passes on larger batches: a large model tries those that cost little, and none without end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph import other_sizes
from prunella.graph.guesses import Seen


class Logarithm(nn.Module):
    """Takes another path from 33 samples on, which no comparison of sizes shows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x))
        if math.log2(int(x.shape[0])) > 5:
            hidden = hidden * 2
        return self.two(hidden)


MACS = 4 * (6 * 16 + 16 * 3)
"""Of a pass on four samples."""


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of samples of the guesses."""
    sizes, new = list[int](), Seen.new

    def noted(self: Seen, batch: Any, *rest: Any, **options: Any) -> bool:
        sizes.append(len(batch))
        return new(self, batch, *rest, **options)

    monkeypatch.setattr(Seen, "new", noted)
    return sizes


def plan() -> None:
    pr.plan(Logarithm().eval(), torch.randn(4, 6), pr.Recipe(pr.magnitude), target=pr.MACs(0.5))


def test_a_small_model_tries_all_sizes(guessed: list[int]) -> None:
    plan()
    assert max(guessed) > 32 and len(guessed) > 5


@pytest.mark.parametrize("passes", [0, 1, 20])
def test_guesses_end_where_their_work_does(monkeypatch: pytest.MonkeyPatch, guessed: list[int], passes: int) -> None:
    monkeypatch.setattr(other_sizes, "WORK", passes * MACS)
    monkeypatch.setattr(other_sizes._Probes, "of_other_form", lambda self: ())
    plan()
    assert sum(max(1.0, size / 4) for size in guessed) <= passes and bool(guessed) == bool(passes)


def test_the_work_is_that_of_the_graph() -> None:
    from prunella.graph.solve.groups import couple

    assert couple(Logarithm().eval(), torch.randn(4, 6)).hints.macs == MACS
