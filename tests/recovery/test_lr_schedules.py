from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.recovery.finetune import Training, finetune, warmup_cosine
from prunella.recovery.lr_schedules import RecordedLR, adaptive_lr, constant_lr, linear_lr, rewind_lr, scaled_lr


def _net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


DATA = [torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) for _ in range(3)]


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def _sgd(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": lr / 8}], lr=lr)


def test_rewinding_replays_the_recorded_rates_element_by_element() -> None:
    net = _net()
    first = finetune(net, DATA, _loss, steps=50, lr=0.037, training=Training(_sgd, warmup_cosine))
    for steps in (1, 7, 23, 50):
        rate = rewind_lr(first.lr, steps=steps)
        again = finetune(net, DATA, _loss, steps=steps, lr=1.0, training=Training(_sgd, rate))
        assert again.lr == first.lr[50 - steps :]


def test_any_number_of_steps_is_replayed_exactly() -> None:
    for steps in range(1, 400):
        replay = RecordedLR(tuple(float(t) for t in range(steps)))
        assert [replay((t + 0.5) / steps) for t in range(steps)] == list(replay.rates)


def test_the_optimizer_steps_with_the_replayed_rates() -> None:
    seen: list[float] = []

    def watched(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        optimizer = _sgd(parameters, lr)
        optimizer.register_step_pre_hook(lambda o, a, k: seen.extend(g["lr"] for g in o.param_groups))
        return optimizer

    rate = rewind_lr([0.4, 0.2, 0.1], steps=2)
    curve = finetune(_net(), DATA, _loss, steps=rate.steps, lr=1.0, training=Training(watched, rate))
    assert seen == [0.2, 0.025, 0.1, 0.0125] and curve.lr == (0.2, 0.1)


def test_the_scaled_curve_is_the_trace_squeezed_with_a_rise() -> None:
    trace = [0.8] * 4 + [0.4] * 2 + [0.1] * 2
    assert scaled_lr(trace, steps=4, warmup=0).rates == (0.8, 0.8, 0.4, 0.1)
    assert scaled_lr(trace, steps=4, warmup=0.5).rates == (0.4, 0.8, 0.4, 0.1)
    assert scaled_lr(trace, steps=8, warmup=0.1).rates == tuple(trace)
    assert scaled_lr([0.1, 0.2], steps=4, warmup=0).rates == (0.1, 0.1, 0.2, 0.2)


def test_constant_and_linear() -> None:
    curve = finetune(_net(), DATA, _loss, steps=4, lr=0.5, training=Training(lr_schedule=constant_lr))
    assert curve.lr == (0.5,) * 4
    curve = finetune(_net(), DATA, _loss, steps=4, lr=0.8, training=Training(lr_schedule=linear_lr))
    assert curve.lr == pytest.approx((0.7, 0.5, 0.3, 0.1))
    assert (linear_lr(0.0), linear_lr(1.0)) == (1, 0)


def test_the_adaptive_start_by_hand() -> None:
    """|w| = 5, removed 3: 3 / (sqrt(0.5) * 5) = 0.848528..."""
    before, after = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, {}
    after = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([4.0])}
    start = adaptive_lr(before, after, peak=0.2, sparsity=0.5, budget=0.1)
    assert start == pytest.approx(0.2 * 3 / (math.sqrt(0.5) * 5))
    assert adaptive_lr(before, after, peak=0.2, sparsity=0.5, budget=0.9) == pytest.approx(0.18)
    assert adaptive_lr(before, before, peak=0.2, sparsity=0.5, budget=0.25) == pytest.approx(0.05)
    assert adaptive_lr(before, after, peak=0.2, sparsity=0.1, budget=2.0) == 0.2


def test_magnitude_pruning_never_moves_further_than_the_adaptive_start_allows() -> None:
    net = nn.Linear(20, 20, bias=False)
    before = copy.deepcopy(dict(net.named_parameters()))
    pr.apply_(net, pr.plan(net, torch.randn(2, 20), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.7)))
    start = adaptive_lr(before, dict(net.named_parameters()), peak=1.0, sparsity=0.7, budget=1e-9)
    moved = (before["weight"] - net.weight).detach().norm() / before["weight"].detach().norm()
    assert start == pytest.approx(float(moved) / math.sqrt(0.7)) and start < 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RequestError, match="last 3 of 2"):
        rewind_lr([0.1, 0.2], steps=3)
    with pytest.raises(RequestError, match="cannot be replayed"):
        RecordedLR(())
    with pytest.raises(RequestError, match="not all finite"):
        RecordedLR((0.1, math.nan))
    with pytest.raises(RequestError, match="out of range"):
        scaled_lr([0.1], steps=0)
    some = {"a": torch.ones(2)}
    with pytest.raises(RequestError, match="same names"):
        adaptive_lr(some, {"a": torch.ones(3)}, peak=1, sparsity=0.5, budget=1)
    with pytest.raises(RequestError, match="out of range"):
        adaptive_lr(some, some, peak=1, sparsity=0, budget=1)
