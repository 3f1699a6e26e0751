"""One operation between two layers: the axis is cut exactly, or it stays and the graph says why. Never in between."""

from __future__ import annotations

import pytest
import torch
from tests.graph.traps.nets import Flat, Image
from tests.graph.traps.operations import BEYOND, FLAT, IMAGE, MODULES
from tests.oracle import Mode, check_exact, cut, exact_groups, frozen_because, produced_by, random_keep, settle
from torch import nn

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.cut.changes import changes
from prunella.graph.solve.groups import couple
from prunella.graph.verify import check, unproven


def verify(
    model: nn.Module, inputs: torch.Tensor, units: int | None, modes: tuple[Mode, ...] = ("all", "readers")
) -> None:
    """Exact, with the units that were expected."""
    graph = check_exact(model, inputs, count=False, modes=modes).graph
    if units:
        assert produced_by(graph, "first").size == units
    elif units == 0:
        assert frozen_because(graph, "first.weight", 0), "the axis must stay, with a reason"
        assert not any(m.entity == "first.weight" for g in exact_groups(graph) for m in g.members)


@pytest.mark.parametrize("name", FLAT)
def test_between_linear_layers(name: str) -> None:
    op, units = FLAT[name]
    verify(Flat(op), Flat.example(), units)


@pytest.mark.parametrize("name", BEYOND)
def test_sizes_that_cannot_be_tracked_are_caught_by_the_check(name: str) -> None:
    model = settle(Flat(BEYOND[name]))
    graph = couple(model, Flat.example())
    if not graph.groups:
        assert frozen_because(graph, "first.weight", 0)
        return
    keep = random_keep(graph)
    with pytest.raises((CheckFailed, NotSupported)):
        check(model, cut(model, graph, keep), changes(graph, keep), Flat.example())
    assert unproven(model, graph, keep, Flat.example()).keys() == keep.keys()


@pytest.mark.parametrize("name", IMAGE)
def test_between_convolutions(name: str) -> None:
    op, units = IMAGE[name]
    verify(Image(op), Image.example(), units)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODULES)
def test_between_linear_layers_of_a_sequence(name: str) -> None:
    build, units = MODULES[name]
    middle = build().eval()
    size = middle(torch.randn(3, 12)).shape[-1]
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 12))
    model.add_module("middle", middle)
    model.add_module("last", nn.Linear(size, 4))
    # a norm of the whole weight sees the rows that its readers ignore
    verify(model, Flat.example(), units, ("all",) if name == "spectral norm" else ("all", "readers"))
