"""Optimizers as they come: inside accelerate, inside another optimizer, with a schedule around their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import prunella as pr
from prunella.errors import RequestError
from prunella.model.unwrap import bare_optimizer, bare_optimizers
from tests.graphs import mlp

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
MASKS = pr.Recipe(granularity=pr.Element())


class Prepared(Optimizer):
    """In the shape of accelerate's: an optimizer by type that never called its constructor."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class Foreign:
    """No optimizer of torch at all, which holds one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner, self.param_groups = optimizer, optimizer.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()


def accelerated(optimizer: Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def scheduled(optimizer: Optimizer) -> Optimizer:
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return optimizer


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "accelerate": accelerated,
    "stand-in": Prepared,
    "nested": lambda optimizer: Prepared(Prepared(optimizer)),
    "foreign": Foreign,
    "scheduled": scheduled,
    "prepared and scheduled": lambda optimizer: Prepared(scheduled(optimizer)),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Optimizer], Any]:
    return WRAPPERS[request.param]


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def test_masks_hold_while_a_wrapped_optimizer_steps(wrap: Callable[[Optimizer], Any]) -> None:
    model, plain = mlp(8), mlp(8)
    for each in (model, plain):
        pr.apply_(each, pr.plan(each, X, MASKS, target=pr.Sparsity(0.5)))
    optimizer, reference = wrap(AdamW(model.parameters(), lr=0.1)), AdamW(plain.parameters(), lr=0.1)
    with pr.Pruner(model, optimizer), pr.Pruner(plain, reference):
        train(model, optimizer)
        train(plain, reference)
    pr.finalize(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_state_is_carried_to_the_small_model(wrap: Callable[[Optimizer], Any]) -> None:
    model = mlp(8)
    optimizer = wrap(AdamW(model.parameters(), lr=0.1))
    train(model, optimizer)
    plan = pr.plan(model, X, target=pr.Sparsity(0.5))
    small = pr.shrink(model, plan)
    pr.transform.carry_(optimizer, model, small, plan)
    before = [p.detach().clone() for p in small.parameters()]
    train(small, optimizer, 1)
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert len(bare_optimizer(optimizer).state) == len(before)


def test_all_that_follows_an_optimizer_takes_a_wrapped_one() -> None:
    def prepared(model: nn.Module) -> Any:
        return Prepared(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    model = mlp(8)
    units = pr.train.coupled_units(model, X)
    optimizer = prepared(model)
    with pr.train.Proximal(model, optimizer, units, group=1e3):
        train(model, optimizer, 1)
    assert int((model[0].weight.detach() != 0).any(1).sum()) == 1
    model = mlp(8)
    pr.apply_(model, pr.plan(model, X, MASKS, target=pr.Sparsity(0.5)))
    before, optimizer = pr.masks_of(model), prepared(model)
    with pr.train.DropGrow(model, optimizer, rule=pr.train.rigl(), steps=10, every=1) as loop:
        train(model, optimizer, 1)
        loop.step()
    assert any(not torch.equal(mask, before[name]) for name, mask in pr.masks_of(model).items())
    units = pr.train.coupled_units(model := mlp(8), X)
    half = pr.train.HalfSpace(model, prepared(model), units, strength=1e-2, start=1)
    half.detach()


class Homemade:
    """Steps that torch knows nothing of."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.1}]

    def step(self) -> None: ...


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused() -> None:
    model = mlp(8)
    with pytest.raises(RequestError, match="the steps of a Homemade cannot be followed"):
        pr.Pruner(model, Homemade(model.parameters()))  # type: ignore[arg-type]


def test_a_plain_optimizer_is_itself() -> None:
    optimizer = AdamW(mlp(8).parameters())
    assert bare_optimizer(optimizer) is optimizer and bare_optimizers([optimizer]) == [optimizer]
    assert bare_optimizer(Prepared(Prepared(optimizer))) is optimizer
