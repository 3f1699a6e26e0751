"""Loops whose step calls a name several times, along a cut axis and along others: right on longer inputs too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import prunella as pr
from prunella.graph.cut.changes import Along
from prunella.graph.restricted import Restricted
from prunella.graph.verify import verify

Op = Callable[[Tensor], Tensor]
OPS: dict[str, Op] = {
    "layer norm": lambda h: layer_norm(h, (h.shape[-1],)),
    "mean": lambda h: h - h.mean(-1, keepdim=True),
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
}
ORDERS = {"cut first": "cu", "cut last": "uc", "two of three": "cuc", "one of three": "ucu"}


class Steps(nn.Module):
    """Every step runs the operation along a cut axis (`c`) or the axis of the inputs (`u`), after `before` others."""

    def __init__(self, op: Op, order: str, before: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)
        self.op, self.order, self.before = op, order, before

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.before):
            x = self.op(x)
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            hidden, outer = self.a(step), step + state
            for part in self.order:
                if part == "c":
                    hidden = self.op(hidden)
                else:
                    outer = self.op(outer)
            state = outer + self.b(torch.relu(hidden))
        return state


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", OPS)
def test_a_step_of_several_calls_is_right_on_a_longer_input(op: str, order: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Steps(OPS[op], ORDERS[order]).eval()
    recipe = pr.Recipe(pr.magnitude, pr.Width())
    plan = pr.plan(model, torch.randn(2, steps, 6), recipe, target=pr.Params(0.8))
    assert any(row.kept < row.total for row in plan.rows)
    assert verify(model, pr.shrink(model, plan), plan.changes, torch.randn(2, 9, 6)).exact


@pytest.mark.parametrize("before", [1, 2])
def test_calls_before_the_loop_are_no_part_of_its_step(before: int) -> None:
    torch.manual_seed(0)
    model = Steps(OPS["layer norm"], "cu", before).eval()
    plan = pr.plan(model, torch.randn(2, 4, 6), pr.Recipe(pr.magnitude, pr.Width()), target=pr.Params(0.8))
    assert verify(model, pr.shrink(model, plan), plan.changes, torch.randn(2, 9, 6)).exact


def restricted(cut: str, calls: int) -> str:
    """Which of so many calls are restricted, given a string of those of the example: `c` for cut, `u` for not."""
    along = [Along("softmax", k, 1, torch.tensor([0, 2]), calls=len(cut)) for k, c in enumerate(cut) if c == "c"]
    scores = torch.zeros(2, 4)
    with Restricted(along):
        return "".join("c" if scores.softmax(1)[0, 1] == 0 else "u" for _ in range(calls))


@pytest.mark.parametrize(
    ("example", "longer"),
    [
        ("c", "cccccc"),
        ("cu", "cucucu"),
        ("cucu", "cucucucu"),
        ("ucuc", "ucucucuc"),
        ("uucucu", "uucucucucu"),
        ("cuucuu", "cuucuucuu"),
        ("uccc", "uccccc"),
        ("cccu", "cccucccu"),
    ],
)
def test_the_step_that_ran_twice_goes_on(example: str, longer: str) -> None:
    assert restricted(example, len(longer)) == longer
