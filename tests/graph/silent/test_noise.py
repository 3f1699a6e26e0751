"""Noise, complex weights, inputs that change, subclasses and the inference mode: exact, or a true reason."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from tests.graph.silent.test_outputs import X, pruned
from torch import Tensor, nn
from torch.nn import functional as F

import prunella as pr
from prunella.errors import NotSupported
from prunella.graph.verify import relative_error, verify
from prunella.model.state import untouched


class Noisy(nn.Module):
    def __init__(self, disturb: Any) -> None:
        super().__init__()
        self.a, self.b, self.disturb = nn.Linear(8, 16), nn.Linear(16, 3), disturb

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.disturb(self.a(x).relu()))  # type: ignore[no-any-return]


NOISE = {
    "dropout": lambda h: F.dropout(h),
    "dropout of features": lambda h: F.dropout1d(h.unsqueeze(0)).squeeze(0),
    "alpha dropout": lambda h: F.alpha_dropout(h, training=True),
    "normal": lambda h: h + torch.randn_like(h),
    "normal of a shape": lambda h: h + torch.randn(h.shape),
    "normal in place": lambda h: h + torch.empty_like(h).normal_(1, 2),
    "uniform": lambda h: h * (torch.rand_like(h) < 0.8),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.2)),
    "exponential": lambda h: h * torch.empty_like(h).exponential_(),
    "poisson": lambda h: torch.poisson(h),
    "reparametrized": lambda h: h + torch.exp(0.5 * h) * torch.randn_like(h),
    "numpy": lambda h: h * float(np.random.rand()),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_told_from_a_fault(name: str) -> None:
    model = Noisy(NOISE[name])
    plan, small = pruned(model)
    assert {row.name for row in plan.rows} == {"a"}
    with torch.no_grad():
        small.b.weight[0] += 0.1  # type: ignore[index, operator, union-attr]
    assert not verify(model, small, plan.changes, X).exact


def test_noise_that_no_seed_repeats_is_named() -> None:
    with pytest.raises(NotSupported, match="two runs of the same model on the same inputs differ"):
        pruned(Noisy(lambda h: h * time.perf_counter_ns()))


class Drawing(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden + torch.randn(hidden.shape, generator=self.generator))  # type: ignore[no-any-return]


def test_a_generator_of_the_model_is_as_it_was() -> None:
    model = Drawing(None)
    model.generator = torch.Generator().manual_seed(3)
    before = model.generator.get_state()
    plan, _ = pruned(model)
    assert torch.equal(model.generator.get_state(), before) and {row.name for row in plan.rows} == {"a"}


@pytest.mark.parametrize("finish", [Tensor.abs, lambda y: y])
def test_complex_weights(finish: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.cfloat), nn.Linear(16, 3, dtype=torch.cfloat))
    whole = nn.Sequential(model, type("End", (nn.Module,), {"forward": lambda self, y: finish(y)})())
    x = torch.randn(2, 8, dtype=torch.cfloat)
    plan, small = pruned(whole, x)
    verification = verify(whole, small, plan.changes, x)
    assert verification.exact and verification.dtype == "float64" and {r.name for r in plan.rows} == {"0.0"}


def test_a_wrong_imaginary_part_is_an_error() -> None:
    y = torch.ones(2, dtype=torch.cfloat)
    assert relative_error([y], [y + 1j]) == pytest.approx(1)


class Scaling(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        x *= 255
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_that_the_model_changes(dtype: torch.dtype) -> None:
    model, x = Scaling(lambda h: h).to(dtype), X.to(dtype).clone()
    plan, small = pruned(model, x)
    pr.report(model, small, x, plan=plan, rounds=5)
    data = [x.clone()]
    pr.plan(model, x, pr.Recipe(pr.wanda, pr.Element()), target=pr.Sparsity(0.5), data=data)
    assert torch.equal(x, X.to(dtype)) and torch.equal(data[0], x)


class Image(Tensor):
    pass


def test_a_subclass_of_tensor_as_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    plan, small = pruned(model, torch.randn(2, 3, 8, 8).as_subclass(Image))
    assert {row.name for row in plan.rows} == {"0"} and small[0].out_channels == 11  # type: ignore[index]


@dataclasses.dataclass
class Batch:
    x: Tensor


def test_an_object_as_input() -> None:
    class Reading(Noisy):
        def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
            batch.x += 1
            return super().forward(batch.x)

    batch = Batch(X.clone())
    plan, _ = pruned(Reading(lambda h: h), (batch,))
    assert torch.equal(batch.x, X) and {row.name for row in plan.rows} == {"a"}


def built() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_a_model_built_in_inference_mode() -> None:
    with torch.inference_mode():
        model = built()
    x = torch.randn(2, 3, 8, 8)
    plan, small = pruned(model, x)
    assert all(p.requires_grad and not p.is_inference() for p in small.parameters())
    pr.apply_(model, plan)
    assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 3


def test_a_plan_made_in_inference_mode() -> None:
    with torch.inference_mode():
        plan, small = pruned(built(), torch.randn(2, 3, 8, 8))
    assert {row.name for row in plan.rows} == {"0"}
    small(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_guard_keeps_the_gradient_mode_of_its_caller() -> None:
    with torch.no_grad(), untouched(built()):
        assert not torch.is_grad_enabled()


@dataclasses.dataclass(frozen=True)
class Config:
    heads: int = 4
    head_dim: int = 8


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.config.heads, self.config.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_sizes_in_a_frozen_dataclass_follow() -> None:
    config = Config()
    model, x = Attention(config), torch.randn(2, 5, 32)
    plan = pr.plan(model, x, pr.Recipe(pr.criteria.random, pr.Head(), pr.uniform), target=pr.Sparsity(0.5))
    small: Any = pr.shrink(model, plan)
    assert small.config.heads == 2 and config.heads == 4 and small(x).shape == x.shape
