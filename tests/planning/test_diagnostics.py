"""What stands in the way is said by kind, and advice follows the kind, not the words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.graph.data import Frozen, ReasonKind
from prunella.graph.solve.groups import couple
from prunella.planning.diagnostics import obstacles, offer
from prunella.planning.render import frozen_lines
from tests.graphs import convnet, hand_graph, images

WORDS = "the size 3 is typed into the source"
X = images()[0]


def frozen(kind: ReasonKind, reason: str = WORDS) -> Frozen:
    return Frozen("0.weight", 0, 4, reason, "net.py:7", kind)


def test_advice_goes_by_the_kind() -> None:
    assert "--program" in offer([frozen(ReasonKind.SOURCE, "whatever it says")])
    advised = {kind for kind in ReasonKind if offer([frozen(kind)])}
    assert advised == {ReasonKind.SOURCE, ReasonKind.COMPLEX}
    assert "--program" in frozen_lines([frozen(ReasonKind.REQUEST), frozen(ReasonKind.SOURCE)])[-1]


def test_obstacles_name_blocks_first_and_the_place() -> None:
    block = Frozen("layers.1", -1, 1, "the block has no parameters", "", ReasonKind.OPERATION)
    lines = obstacles(hand_graph(), [frozen(ReasonKind.SOURCE), block], limit=1)
    assert lines == ["frozen: layers.1, a block: the block has no parameters", "and 1 more frozen axes"]


class Sized(nn.Module):
    """A size typed into the source, a size used in a calculation, and what is read by neither."""

    def __init__(self) -> None:
        super().__init__()
        self.typed, self.used, self.last = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.typed(x).view(-1, 3, 4).flatten(1)
        hidden = self.used(wide)
        out = self.last(hidden * (hidden.shape[1] * 2))
        assert isinstance(out, Tensor)
        return out


def test_the_kind_comes_from_where_the_reason_is_found() -> None:
    found = {entry.entity: entry for entry in couple(Sized(), torch.randn(2, 4)).frozen}
    for name, words in (("typed.weight", "typed into the source"), ("used.weight", "used in a calculation")):
        assert words in found[name].reason and found[name].kind is ReasonKind.SOURCE
    assert found["last.weight"].kind is ReasonKind.OPERATION
    with pytest.raises(NotSupported, match="as_program"):
        pr.plan(Sized(), torch.randn(2, 4), target=pr.MACs(0.5))
    model = convnet()
    plan = pr.plan(model, X, target=pr.Sparsity(0.25), skip=["0"])
    kinds = {entry.entity: entry.kind for entry in plan.frozen}
    assert kinds["0.weight"] is ReasonKind.REQUEST and kinds["7.weight"] is ReasonKind.OPERATION
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    scales = pr.plan(layers, torch.randn(2, 4), pr.Recipe(pr.criteria.bn_scale), target=pr.Sparsity(0.25))
    assert {entry.entity: entry.kind for entry in scales.frozen}["2.weight"] is ReasonKind.UNSCORED
    others = pr.plan(model, X, target=pr.Sparsity(0.25), only=["0"])
    assert {e.kind for e in others.frozen if e.entity == "3.weight"} == {ReasonKind.REQUEST}
