"""One call on every small model of the zoo with random data: the target is met exactly, or a sentence says why not."""

from __future__ import annotations

import itertools

import pytest
import torch

import prunella as pr
from prunella.errors import PruningError
from prunella.graph.verify import verify
from tests.zoo.test_zoo import CASES, Case

SHARE = 0.75


def pruned(case: Case) -> str:
    """What one call does: "pruned", or the error in one sentence. AssertionError for a target missed or inexact."""
    torch.manual_seed(0)
    model, example = case.build().eval(), torch.randn(case.shape)
    data = [torch.randn(8, *case.shape[1:]) for _ in range(4)]
    try:
        done = pr.prune(model, example, target=pr.MACs(SHARE), data=data, recover={"steps": 4})
    except PruningError as error:
        assert error.what and "\n" not in error.what, error
        return f"{error.what}: {error.why}"
    assert done.plan.after.macs <= SHARE * done.plan.before.macs
    assert verify(model, pr.shrink(model, done.plan), done.plan.changes, example).exact
    last = [stage.after for stage in done.history if stage.after is not None]
    assert all(second <= first * 1.002 for first, second in itertools.pairwise(last)), done.history
    return "pruned"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_call_prunes_the_zoo(name: str) -> None:
    assert pruned(CASES[name]) == "pruned"
