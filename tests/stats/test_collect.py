"""One pass, only what is asked for, and no trace of it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


class Noisy(nn.Module):
    """Everything that looking at a model may disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1 + 0 * torch.rand(()) * random.random() * np.random.rand()
        return self.last(self.drop(self.norm(self.first(x))))  # type: ignore[no-any-return]


def test_a_model_is_left_bit_for_bit_as_it_was() -> None:
    model = Noisy().train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.last.bias.grad = torch.full((3,), 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training) for m in model.modules()]
    calls, grads = model.calls, [p.grad for p in model.parameters()]
    dice = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with untouched(model, 3):
        assert not any(m.training for m in model.modules())
        model.train()
        model(torch.randn(5, 4)).sum().backward()
        model.requires_grad_(True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls is calls and [m.training for m in model.modules()] == flags
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert not model.first.weight.requires_grad and model.last.weight.requires_grad
    assert torch.equal(dice[0], torch.get_rng_state()) and dice[1] == random.getstate()
    assert (dice[2] == np.random.get_state()[1]).all()


def test_a_model_is_restored_after_an_error_too() -> None:
    model = Noisy().train()
    with pytest.raises(ZeroDivisionError), untouched(model, 0):
        raise ZeroDivisionError
    assert model.training and model.drop.training


def test_a_shuffling_loader_gives_the_same_batches_for_the_same_seed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(64)), batch_size=4, shuffle=True)
    model, seen = mlp(), []
    for seed in (0, 0, 1):
        torch.rand(3)
        with untouched(model, seed):
            seen.append([batch[0].tolist() for batch in loader])
    assert seen[0] == seen[1] != seen[2]
