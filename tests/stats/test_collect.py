"""One pass, only what is asked for, and no trace of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.model.state import untouched
from prunella.stats import Source, Subject, collect
from tests.graphs import hand_graph, mlp, square_loss


def test_statistics_without_data_do_not_touch_the_data() -> None:
    def explode() -> Iterator[Tensor]:
        raise AssertionError("the data was read")
        yield

    found = collect(Subject(mlp(), hand_graph()), ["weight", "norm_scale"], Source(explode(), square_loss))
    assert found.batches == 0 and not found.values


def test_all_statistics_come_from_one_pass() -> None:
    passes = []

    def once() -> Iterator[Tensor]:
        passes.append(1)
        yield from (torch.randn(3, 4) for _ in range(5))

    model, graph = mlp(), hand_graph()
    with untouched(model, 0):
        needs = ["grad", "grad_sq", "gate_grad", "input_norm"]
        found = collect(Subject(model, graph, groups=graph.groups), needs, Source(once(), square_loss))
    assert passes == [1] and found.batches == 5 and set(found.values) == set(needs)


@pytest.mark.parametrize(
    ("need", "source", "message"),
    [
        ("gate_grad", Source(), "taylor needs `gate_grad`: pass data= and loss="),
        ("gate_grad", Source(data=[1]), "loss= is missing"),
        ("input_norm", Source(), "taylor needs `input_norm`: pass data="),
        ("input_norm", Source(data=torch.zeros(3, 4)), "data= is one Tensor"),  # type: ignore[arg-type]
        ("input_norm", Source(data=[[torch.zeros(3, 4)]]), "cannot be called on a batch of type list"),
    ],
)
def test_what_is_missing_is_named(need: str, source: Source, message: str) -> None:
    model, graph = mlp(), hand_graph()
    with untouched(model, 0), pytest.raises(RequestError, match=message):
        collect(Subject(model, graph, layers=graph.layers), [need], source, "taylor")


def test_an_empty_loader_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no batches"):
        collect(Subject(mlp(), hand_graph()), ["input_norm"], Source([]))
