"""The reach of pruning: the share of the parameters that could be removed, in the model as it is and as a program."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from prunella.errors import PruningError
from prunella.graph.data import Graph, Kind, ReasonKind
from prunella.graph.program.capture import as_program
from prunella.graph.solve.groups import couple

EXACT: tuple[Kind, ...] = ("channel", "head")
"""The kinds of units whose removal equals zeros in their place."""
WIDER: tuple[Kind, ...] = (*EXACT, "width", "expert")


def reach(graph: Graph, kinds: Collection[Kind]) -> float:
    """The share of the parameters removed if every group of these kinds keeps its minimum of units."""
    keep = {g.name: torch.arange(g.size, device="cpu") < g.min_units for g in graph.groups if g.kind in kinds}
    return 1 - graph.params(keep) / (graph.params() or 1)


def in_program(model: nn.Module, inputs: Any, graph: Graph) -> float | None:
    """`reach` of channels and heads as a program, if literal sizes in the source freeze many parameters; else None."""
    kept = {entry.entity for entry in graph.frozen if entry.kind is ReasonKind.SOURCE}
    share = sum(graph.numel(name) for name in kept if name in graph.entities) / (graph.params() or 1)
    if share < _MANY:
        return None
    try:
        return reach(couple(as_program(model, inputs), inputs), EXACT)
    except PruningError:  # not every model can be captured
        return None


_MANY = 0.25
"""Share of the parameters from which a capture, which takes seconds, is worth while."""
