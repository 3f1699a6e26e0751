"""A shape that is asked is the shape that is left, and the constraint holds before it is enforced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.train.gates.target_shape import TargetShape

SHAPE = {"0": 5, "2": 4}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return [(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1))]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_the_constraint_goes_to_zero_and_the_shape_is_hit_exactly() -> None:
    model = net()
    units = pr.train.coupled_units(model, batches()[0][0])
    pr.train.l0_gates_(model, units)
    shape = TargetShape(units, SHAPE, rate=0.3)
    start = shape.step(copy.deepcopy(model))
    assert min(start.values()) > 0.4
    gaps: list[dict[str, float]] = []
    training = pr.recovery.Training(
        optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr=lr), lr_schedule=lambda _: 1.0
    )
    pr.finetune(model, batches(), pr.train.penalized(loss, shape.penalty), steps=900, lr=0.05, training=training,
                on_step=lambda *_: gaps.append(shape.step(model)))  # fmt: skip
    assert max(abs(gap) for gap in gaps[-1].values()) < 0.05
    shape.close_(model)
    pr.train.merge_gates_(model)
    plan = pr.planning.plan_zeros(model, batches()[0][0])
    assert {name: int(keep.sum()) for name, keep in plan.keep.items()} == SHAPE
    small = pr.shrink(model, plan)
    assert torch.allclose(small(batches()[0][0]), model(batches()[0][0]), atol=1e-5)


def test_the_penalty_by_hand_and_the_climb() -> None:
    model = net()
    units = pr.train.coupled_units(model, batches()[0][0])
    pr.train.l0_gates_(model, units, start=0.0)
    shape = TargetShape(units, {"0": 6}, rate=0.5)
    alive = 0.8318 * 12  # concept 47: at log_alpha 0 a gate is open with probability 0.8318
    gap = (alive - 6) / 12
    assert float(shape.penalty(model).detach()) == 0.0
    assert shape.step(model)["0"] == pytest.approx(gap, abs=1e-4)
    assert shape.multipliers["0"] == pytest.approx((0.5 * gap, 0.5 * gap**2), abs=1e-4)
    assert float(shape.penalty(model).detach()) == pytest.approx(0.5 * gap**2 + 0.5 * gap**4, abs=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = net()
    units = pr.train.coupled_units(model, batches()[0][0])
    for wrong in ({"0": 13}, {"0": 0}, {"9": 1}, {}):
        with pytest.raises(RequestError):
            TargetShape(units, wrong)
    with pytest.raises(RequestError, match="no gate"):
        TargetShape(units, {"0": 3}).penalty(model)
