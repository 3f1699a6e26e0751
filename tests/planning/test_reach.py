"""The share of the parameters within reach, and what frees the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunella.cli.info import _graph_text, graph_data
from prunella.graph.data import ReasonKind
from prunella.graph.solve.groups import couple
from prunella.planning.diagnostics import frees
from prunella.planning.reach import EXACT, WIDER, in_program, reach


def test_reach_by_hand() -> None:
    torch.manual_seed(0)
    graph = couple(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    assert reach(graph, EXACT) == pytest.approx(1 - (4 + 1 + 3 + 3) / (32 + 8 + 24 + 3))


def test_a_width_is_within_reach_with_widths_only() -> None:
    torch.manual_seed(0)
    graph = couple(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 4))
    assert reach(graph, EXACT) == 0.0 and reach(graph, WIDER) > 0.7
    text = _graph_text(graph_data(graph), None)
    assert "within reach: 0.0% of the parameters by channels and heads" in text.splitlines()[0]
    assert "with widths and experts" in text.splitlines()[0]


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).view(-1, 2, 8).sum(1))
        return out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_size_in_the_source_names_the_program_and_its_reach() -> None:
    torch.manual_seed(0)
    model, x = Typed(), torch.randn(2, 8)
    graph = couple(model, x)
    captured = in_program(model, x, graph)
    assert captured is not None and captured > 0.5 > reach(graph, EXACT)
    text = _graph_text(graph_data(graph) | {"reach_in_program": captured}, None)
    assert "what frees it" in text and "of the parameters are then within reach" in text
    free = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    assert in_program(free, x, couple(free, x)) is None


@pytest.mark.parametrize(("kind", "word"), [(ReasonKind.SOURCE, "--program"), (ReasonKind.RULE, "rule")])
def test_what_frees_a_kind_of_reason(kind: ReasonKind, word: str) -> None:
    assert word in frees(kind) and not frees(ReasonKind.OPERATION)
