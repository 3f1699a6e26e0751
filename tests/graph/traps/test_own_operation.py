"""An operation of the user's own: unknown it freezes, with a rule it is followed, with a wrong rule it is caught."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.oracle import check_exact, frozen_because, produced_by
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.graph.rules import RULES, Context, Returned, rule
from prunella.graph.solve.groups import couple
from prunella.graph.trace.recorder import Trace, TracedValue


@torch.library.custom_op("prunella_tests::flip_gain", mutates_args=())
def flip_gain(x: Tensor, scale: Tensor) -> Tensor:
    """Channels in reverse order, each with a gain."""
    return x.flip(1) * scale[:, None, None]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 3)
        self.scale = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(flip_gain(self.first(x), self.scale))
        return out


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_without_a_rule_it_freezes_all_that_it_touches() -> None:
    model, x = _Net(), torch.randn(2, 3, 8, 8)
    graph = couple(model, x)
    assert not graph.groups and frozen_because(graph, "first.weight", 0, "prunella_tests.flip_gain has no rule")
    assert graph.uncounted == {"prunella_tests.flip_gain": 1}
    with pytest.raises(NotSupported, match="has no rule"):
        pr.plan(model, x, target=pr.Sparsity(0.5))


def test_with_a_rule_it_is_followed(rules: None) -> None:
    @rule("prunella_tests.flip_gain")
    def right(trace: Trace, ctx: Context) -> Returned:
        x, scale = ctx.value(0), ctx.value(1)
        mirrored = tuple(layer[::-1].copy() for layer in x.dims[1])
        return TracedValue.plain([x.dims[0], trace.equal(mirrored, scale.dims[0], "scale"), *x.dims[2:]])

    torch.manual_seed(0)
    checked = check_exact(_Net(), torch.randn(2, 3, 8, 8), count=False)
    assert produced_by(checked.graph, "first").size == 10


def test_a_wrong_rule_is_caught(rules: None) -> None:
    @rule("prunella_tests.flip_gain")
    def wrong(trace: Trace, ctx: Context) -> Returned:
        x, scale = ctx.value(0), ctx.value(1)
        return TracedValue.plain([x.dims[0], trace.equal(x.dims[1], scale.dims[0], "scale"), *x.dims[2:]])

    torch.manual_seed(0)
    with pytest.raises(NotSupported, match="cannot be proven"):
        pr.plan(_Net(), torch.randn(2, 3, 8, 8), pr.Recipe(pr.criteria.random), target=pr.Sparsity(0.4))
