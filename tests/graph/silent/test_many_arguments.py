"""Many arguments at once, and what a call with another argument returns beside the outputs of the example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.graph.silent.test_arguments import INNER, RECIPE, Base, X
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.graph.arguments import variants
from prunella.graph.verify import verify


class Many(Base):
    """So many arguments that they are tried together."""

    def forward(
        self,
        x: Tensor,
        *,
        p: bool = False,
        q: bool = False,
        r: bool = False,
        s: bool = False,
        t: bool = False,
        u: bool = False,
        v: Tensor | None = None,
    ) -> Tensor:
        if p and (q or r or s or t or u):
            raise ValueError("p is given alone")
        y = self.a(x).relu()
        y = y.flip(-1) if s else y
        y = y.flip(-1) if t else y
        y = y * 2 if v is not None else y
        return self.b(y[:, [1, 0, 3, 2, 5, 4, 7, 6]] if p else y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("other", ["s", "t"])
def test_many_arguments_are_tried_together(other: str) -> None:
    model = Many().eval()
    plan = pr.plan(model, X, RECIPE, target=pr.Params(0.9))
    small = pr.shrink(model, plan)
    assert verify(model, small, plan.changes, {"x": X, other: True}).exact and "free" in plan.keep
    assert len(variants(model, X).batches) <= 4, "seven arguments"


class Cancelling(Base):
    """Many arguments, of which all together compute what none of them does."""

    def forward(
        self,
        x: Tensor,
        *,
        q: bool = False,
        r: bool = False,
        s: bool = False,
        t: bool = False,
        u: bool = False,
        w: bool = False,
    ) -> Tensor:
        y = self.a(x).relu()
        y = y.flip(-1) if s else y
        y = y.flip(-1) if t else y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("other", ["s", "t"])
def test_arguments_that_undo_each_other_are_in_different_batches(other: str) -> None:
    model = Cancelling().eval()
    plan = pr.plan(model, X, RECIPE, target=pr.Params(0.9))
    small = pr.shrink(model, plan)
    assert verify(model, small, plan.changes, {"x": X, other: True}).exact


def test_arguments_that_exclude_each_other_are_tried_apart() -> None:
    changes = [variant.changes for variant in variants(Many().eval(), X).batches]
    assert ("p=True",) in changes and any(set(some) >= {"s=True"} for some in changes)
    assert not any(len(some) > 1 and "p=True" in some and "v=" not in some[1] for some in changes)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.end = nn.ModuleList(Block() for _ in range(4)), nn.Linear(6, 2)

    def run(self, x: Tensor) -> list[Tensor]:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class States(Blocks):
    def forward(self, x: Tensor, states: bool = False) -> Any:
        kept = self.run(x)
        return (self.end(kept[-1]), kept) if states else self.end(kept[-1])


class Averages(Blocks):
    def forward(self, x: Tensor, average: bool = False) -> Any:
        kept = self.run(x)
        result = self.end(kept[-1])
        return (torch.stack(kept).mean(0), result) if average else result


class Third(Blocks):
    def forward(self, x: Tensor, third: bool = False) -> Any:
        return self.end(self.run(x)[3 if third else -1])


DEPTH = pr.Recipe(pr.criteria.random, pr.Depth(), pr.uniform)


def test_states_of_blocks_are_those_of_the_kept_blocks() -> None:
    plan = pr.plan(States().eval(), X, DEPTH, target=pr.Params(0.8))
    assert f"with states=True {INNER}" in plan.remarks and plan.changes.dropped


def test_what_depends_on_the_number_of_blocks_is_named() -> None:
    plan = pr.plan(Averages().eval(), X, DEPTH, target=pr.Params(0.8))
    assert plan.changes.dropped and any(
        line.startswith("with average=True some outputs depend on") for line in plan.remarks
    )


def test_blocks_stay_where_the_result_itself_is_another_one() -> None:
    with pytest.raises(NotSupported, match="with third=True a cut of it is wrong, though it is right on the example"):
        pr.plan(Third().eval(), X, DEPTH, target=pr.Params(0.8))
