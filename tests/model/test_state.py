"""A look at a model leaves no trace, whatever the model writes while it runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunella.llm.streaming.memory import Live
from prunella.model.state import Steady, mode, untouched
from tests.graphs import mlp


def test_mode_gives_every_module_its_own_flag_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(KeyError), mode(model, training=False):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False, False]


def test_weights_that_change_under_autocast_are_not_read_from_its_copies() -> None:
    model = nn.Linear(4, 4, bias=False)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # autocast keeps a copy from here to the end
        with mode(model, training=False):
            model(x)
            model.weight.data.fill_(1.0)
            assert model(x).tolist() == [[4.0] * 4]
        assert torch.is_autocast_cache_enabled()


class OwnTrain(nn.Sequential):
    """A model with a `train` of its own, which may write into parameters, as those of transformers have one."""

    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        return self


def test_guards_inside_each_other_keep_one_copy_of_the_parameters() -> None:
    model = OwnTrain(OwnTrain(nn.Linear(64, 64)), nn.Linear(64, 64))
    size = sum(p.numel() * 4 for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with Live() as live, untouched(model), untouched(model):
        assert size <= live.now < 1.1 * size
        with torch.no_grad():
            model[1].weight.add_(1)
        inner = [p.detach().clone() for p in model.parameters()]
        with untouched(model), torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), inner, strict=True))
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


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
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with untouched(model, 3):
        assert not any(m.training for m in model.modules())
        model.train()
        model(torch.randn(5, 4)).sum().backward()
        model.requires_grad_(True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls is calls and [m.training for m in model.modules()] == flags
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert not model.first.weight.requires_grad and model.last.weight.requires_grad
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


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


class Caching(nn.Module):
    """Keeps caches of every kind in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {0: torch.zeros(1)}
        self.sizes = {0}
        self.table = torch.zeros(4)
        self.last: Tensor | None = None
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.seen.append(y)
        self.by_size[len(x)] = self.by_size[0] = y
        self.sizes.add(len(x))
        self.table.add_(1)
        self.mean.add_(1)  # type: ignore[operator]
        self.last, self.new = y, y
        return y


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_caches_in_plain_attributes_are_as_before(error: type[Exception] | None) -> None:
    model = Caching()
    zero, table, mean = model.by_size[0], model.table, model.mean
    try:
        with untouched(model):
            model(torch.ones(3, 4))
            if error:
                raise error
    except ZeroDivisionError:
        pass
    assert model.seen == [] and model.by_size == {0: zero} and model.sizes == {0} and model.last is None
    assert model.table is table and not bool(table.any()) and model.mean is mean and not bool(mean.any())  # type: ignore[operator]
    assert "new" not in vars(model) and model.training


def test_hooks_that_a_run_registers_are_gone() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(kept := lambda *_: None)
    with untouched(model):
        model.register_forward_hook(lambda *_: None)
    assert list(model._forward_hooks.values()) == [kept]


def test_a_backward_pass_does_not_add_to_the_callers_gradient() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    before = grad.clone()
    with untouched(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is grad and torch.equal(grad, before)


def test_without_a_seed_the_generators_go_on_inside_and_are_restored() -> None:
    model = nn.Linear(1, 1)
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    with untouched(model):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), first)


def test_buffers_without_values_or_of_other_layouts_are_no_obstacle() -> None:
    model = nn.Module()
    model.register_buffer("meta", torch.empty(3, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("nan", torch.full((2,), float("nan")))
    sparse: Any = model.sparse
    with untouched(model):
        model.nan = torch.zeros(2)
        sparse.mul_(2)
    assert torch.equal(sparse.to_dense(), torch.eye(3)) and bool(model.nan.isnan().all())  # type: ignore[operator]


def test_layers_that_torch_would_fuse_run_apart() -> None:
    with untouched(nn.Linear(1, 1)):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class Hooked(nn.Linear):
    """Hooks itself at its first run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._forward_hooks:
            self.register_forward_hook(lambda module, args, output: output + 1)
        return super().forward(x)


def test_a_hook_that_a_run_adds_is_gone_after_it() -> None:
    model, x = Hooked(2, 2), torch.ones(1, 2)
    with untouched(model):
        model(x)
        assert model._forward_hooks
    assert not model._forward_hooks


class Writing(nn.Module):
    """Every run counts in a buffer, in an attribute and in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("runs", torch.zeros(1))
        self.count, self.log = 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight += 1
        self.runs += 1
        self.count += 1
        self.log.append(self.count)
        return x + self.runs + self.count + self.weight.sum()


def test_many_runs_begin_with_the_same_model() -> None:
    model, x = Writing().train(), torch.zeros(1)
    steady = Steady(model, values=True)
    for _ in range(3):
        with steady.run():
            assert not model.training
            assert model(x).item() == 4
            model(x).sum().backward()
        assert model.training and model.weight.grad is None
        assert model.count == 0 and not model.log
        assert model.runs.item() == 0 and model.weight.sum().item() == 0


def test_an_undo_that_fails_does_not_keep_the_others_from_it() -> None:
    model, x = Writing(), torch.zeros(1)
    steady = Steady(model)
    steady._undos.insert(3, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError), steady.run():
        model(x)
    assert model.count == 0 and model.runs.item() == 0 and model.training
