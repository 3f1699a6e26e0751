"""After an error of the user's, or an interrupt, a model in recovery is as it was before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr

DATA = [torch.randn(8, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]
ERRORS = (RuntimeError("the user's"), KeyboardInterrupt(), ZeroDivisionError())
Act = Callable[[nn.Module, nn.Module, BaseException], object]


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net[3].weight.grad = torch.ones(16, 16)
    return net


def _square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


class _Fails:
    """A loss that raises on its fourth call, after it has drawn random numbers."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        torch.rand(1), random.random()
        if self.calls > 3:
            raise self.error
        return _square(model, batch)


def _data(error: BaseException) -> Iterator[Tensor]:
    yield from DATA[:2]
    raise error


def _raise(error: BaseException) -> None:
    raise error


def _failing_solver(error: BaseException) -> Any:
    calls: list[int] = []

    def method(weight: Tensor, gram: Tensor, pattern: Any, *, sparsity: float) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise error
        return pr.solvers.sparsegpt(weight, gram, pattern, sparsity=sparsity)

    return pr.llm.OneShot(method=method, sparsity=0.5)


ACTS: dict[str, Act] = {
    "finetune, loss": lambda m, _, error: pr.finetune(m, DATA, _Fails(error), steps=9, lr=1e-2),
    "finetune, data": lambda m, _, error: pr.finetune(m, _data(error), _square, steps=9, lr=1e-2),
    "finetune, on_step": lambda m, _, e: pr.finetune(m, DATA, _square, steps=9, lr=1e-2, on_step=lambda *_: _raise(e)),
    "distill, loss": lambda m, t, error: pr.distill(m, t, DATA, steps=9, lr=1e-2, imitate=lambda _: _Fails(error)),
    "distill, data": lambda m, t, error: pr.distill(m, t, _data(error), steps=9, lr=1e-2),
    "distill_lm_, data": lambda m, t, error: pr.recovery.distill_lm_(m, t, _data(error), steps=9, lr=1e-2),
    "solve_, solver": lambda m, _, error: pr.llm.solve_(m, DATA[0], _failing_solver(error), data=DATA),
    "solve_, on_layer": lambda m, _, error: pr.llm.solve_(
        m, DATA[0], pr.llm.OneShot(sparsity=0.5), data=DATA, on_layer=lambda *_: _raise(error)
    ),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("act", ACTS)
def test_the_model_is_as_it_was_before(act: str, error: BaseException) -> None:
    model, teacher = _net(), _net().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    flags = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    generators = torch.get_rng_state(), random.getstate()
    with pytest.raises((type(error), pr.PruningError)):
        ACTS[act](model, teacher, error)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert pr.masks_of(model) == {}
    assert torch.equal(model[3].weight.grad, torch.ones(16, 16)) and model[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: None,
        lambda w: w,
        lambda w: pr.solvers.Solved(w[:1], w[:1] != 0, 0.0),
        lambda w: pr.solvers.Solved(w, torch.ones_like(w), 0.0),
    ],
)
def test_what_a_solver_returns_is_checked(wrong: Callable[[Tensor], Any]) -> None:
    how = pr.llm.OneShot(method=lambda w, gram, pattern, *, sparsity: wrong(w), sparsity=0.5)
    with pytest.raises(pr.errors.RequestError, match="the solver returned for"):
        pr.llm.solve_(_net(), DATA[0], how, data=DATA)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_is_not_finite_is_written(value: float) -> None:
    def method(weight: Tensor, gram: Tensor, pattern: Any, *, sparsity: float) -> Any:
        return pr.solvers.Solved(torch.full_like(weight, value), torch.ones_like(weight, dtype=torch.bool), 0.0)

    model = _net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = pr.llm.solve_(model, DATA[0], pr.llm.OneShot(method=method, sparsity=0.5), data=DATA)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert "not finite" in str(result)
