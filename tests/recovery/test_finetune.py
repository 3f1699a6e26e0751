from __future__ import annotations

import copy
import math
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import CheckFailed, Locked, RequestError
from prunella.model.masks import finalize
from prunella.recovery.finetune import Training, adamw, finetune, warmup_cosine
from prunella.transform.apply import apply_
from tests.hand import hand_plan


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def _data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(96, 4)
    y = (x[:, 0] > 0).long()
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_it_learns_and_the_curve_holds_every_loss_and_learning_rate() -> None:
    net, seen = _net(), []
    curve = finetune(net, _data(), _loss, steps=40, lr=0.02, on_step=lambda *step: seen.append(step))
    assert len(curve.loss) == len(curve.lr) == 40
    assert sum(curve.loss[-5:]) < 0.6 * sum(curve.loss[:5])
    assert curve.lr == pytest.approx([0.02 * warmup_cosine((t + 0.5) / 40) for t in range(40)])
    assert seen == list(zip(range(40), curve.loss, curve.lr, strict=True))
    assert "40 steps" in str(curve) and "0.02" in str(curve)


def test_the_learning_rate_rises_and_falls() -> None:
    found = [warmup_cosine(p) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert warmup_cosine(0.0, warmup=0.0) == 1


def test_the_learning_rate_reaches_every_group_in_proportion() -> None:
    rates: list[list[float]] = []

    def factory(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": lr / 10}]
        optimizer = torch.optim.SGD(groups, lr=lr)
        optimizer.register_step_pre_hook(lambda o, a, k: rates.append([g["lr"] for g in o.param_groups]))
        return optimizer

    finetune(
        _net(), _data(), _loss, steps=2, lr=0.1, training=Training(optimizer=factory, lr_schedule=lambda p: 1 - p / 2)
    )
    assert rates == [pytest.approx([0.0875, 0.00875]), pytest.approx([0.0625, 0.00625])]


def test_masks_stay_in_force() -> None:
    net, mask = _net(), torch.rand(8, 4) > 0.5
    apply_(net, hand_plan(masks={"0.weight": mask}))
    before = net[0].weight.detach().clone()
    finetune(net, _data(), _loss, steps=5, lr=0.05)
    assert torch.equal(net[0].weight != 0, mask)
    assert not torch.equal(net[0].weight, before)
    finalize(net)


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_state_is_kept() -> None:
    first, second, third = _net(), _net(), _net()
    state = torch.get_rng_state()
    finetune(first, _data(), _loss, steps=6, lr=0.01, training=Training(seed=3))
    torch.set_rng_state(state)
    torch.randn(7)
    expected = torch.get_rng_state()
    data = _data()
    torch.set_rng_state(expected)
    finetune(second, data, _loss, steps=6, lr=0.01, training=Training(seed=3))
    assert torch.equal(torch.get_rng_state(), expected)
    finetune(third, data, _loss, steps=6, lr=0.01, training=Training(seed=4))
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, third[0].weight)


def test_training_flags_and_frozen_parameters_are_kept() -> None:
    net = _net().eval()
    net[1].train()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net[0].state_dict())
    finetune(net, _data(), _loss, steps=3, lr=0.1)
    assert [m.training for m in net] == [False, True, False, False, False]
    assert all(torch.equal(v, before[k]) for k, v in net[0].state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_of_nan_gives_the_last_good_state_back() -> None:
    net, states = _net(), []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = _loss(model, batch)
        if len(states) == 3:
            return value * float("nan")
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return value

    with pytest.raises(CheckFailed, match="nan at step 3"):
        finetune(net, _data(), loss, steps=9, lr=0.05)
    assert all(torch.equal(v, states[-1][k]) for k, v in net.state_dict().items())
    assert net.training


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    net = nn.Linear(2, 1)
    before = copy.deepcopy(net.state_dict())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * 0).abs().sqrt().sum()

    with pytest.raises(CheckFailed, match="gradient"):
        finetune(net, [torch.ones(1, 2)], loss, steps=2, lr=0.1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_gradients_are_clipped() -> None:
    def moved(clip: float) -> float:
        net = nn.Linear(2, 1, bias=False)
        before = net.weight.detach().clone()
        sgd = lambda p, lr: torch.optim.SGD(p, lr=lr)  # noqa: E731
        loss = lambda m, b: 1000 * m(b).sum()  # noqa: E731
        training = Training(optimizer=sgd, lr_schedule=lambda p: 1.0, clip=clip)
        finetune(net, [torch.ones(1, 2)], loss, steps=1, lr=1.0, training=training)
        return float((net.weight.detach() - before).norm())

    assert moved(0.5) == pytest.approx(0.5, rel=1e-4)
    assert moved(0) == pytest.approx(1000 * math.sqrt(2), rel=1e-4)


def test_biases_and_scales_do_not_decay() -> None:
    groups = adamw(list(_net().parameters()), 0.1).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.01, 2), (0.0, 4)]
    assert len(adamw([nn.Parameter(torch.zeros(3))], 0.1).param_groups) == 1


@pytest.mark.parametrize(
    ("data", "steps", "lr", "words"),
    [([], 1, 0.1, "no batches"), (_data(), 0, 0.1, "positive"), (_data(), 1, math.nan, "positive")],
)
def test_requests_without_sense_are_refused(data: list[object], steps: int, lr: float, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        finetune(_net(), data, _loss, steps=steps, lr=lr)


def test_a_loss_of_many_numbers_and_a_frozen_model_are_refused() -> None:
    with pytest.raises(RequestError, match="one number"):
        finetune(_net(), _data(), lambda m, b: m(b[0]), steps=1, lr=0.1)
    with pytest.raises(RequestError, match="requires a gradient"):
        finetune(_net().requires_grad_(False), _data(), _loss, steps=1, lr=0.1)


def test_one_checkpoint_belongs_to_one_training(tmp_path: Path) -> None:
    how, refused = Training(checkpoint=tmp_path / "training.safetensors"), list[str]()

    def second() -> None:
        with pytest.raises(Locked) as told:
            finetune(_net(), _data(), _loss, steps=2, lr=0.02, training=how)
        refused.append(str(told.value))

    def on_step(*_: float) -> None:
        other = Thread(target=second)
        other.start()
        other.join()

    finetune(_net(), _data(), _loss, steps=2, lr=0.02, training=how, on_step=on_step)
    assert len(refused) == 2 and "training.safetensors is in use" in refused[0]
    assert [file.name for file in tmp_path.iterdir()] == []
