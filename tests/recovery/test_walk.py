"""One walk over the data gives what a pass for each layer gives, and reads the data once."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed
from prunella.recovery.walk import PausedPass


class Residual(nn.Module):
    """Convolutions with batch norms and two residual sums, the second shortcut computed behind the branch."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6)
        self.conv3, self.conv4 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.short = nn.Conv2d(6, 12, 1, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        branch = self.conv4(self.conv3(x).relu())
        return self.head((self.short(x) + branch).relu().mean((2, 3)))


class Twice(nn.Module):
    """A layer that is used twice, between layers that are used once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.again(self.again(x).relu()).relu())


class InPlace(nn.Module):
    """The input of a layer changes in place before its output is used: the layer cannot be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x)
        x.mul_(0.5)
        return self.c(y.relu() + x)


class Gated(nn.Module):
    """A gate that a module keeps for a later layer: it differs between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.gate = (x.mean(1, keepdim=True) * 3).sigmoid()
        y = self.b(self.a(x).relu()).relu()
        return self.c(y * self.gate)


LOCK = threading.RLock()


class Locked(nn.Module):
    """A lock that all passes share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        with LOCK:
            return self.c(self.b(self.a(x).relu()).relu())


class Attended(nn.Module):
    """An attention module: one call reads several weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


def _noisy_norms(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_mean, norm.weight.data, norm.bias.data):
                assert values is not None
                values.normal_()
            assert norm.running_var is not None
            norm.running_var.uniform_(0.5, 2)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norms": (lambda: _noisy_norms(Residual()), (3, 6, 6)),
    "biases": (lambda: _noisy_norms(Residual(bias=True)), (3, 6, 6)),
    "twice": (Twice, (6,)),
    "in place": (InPlace, (6,)),
    "attention": (Attended, (3, 5)),
    "kept on the module": (Gated, (6,)),
    "a lock": (Locked, (6,)),
}


def _pruned(name: str) -> tuple[nn.Module, nn.Module, pr.Plan, list[Tensor]]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().double().eval()
    data = [torch.randn(16, *shape, dtype=torch.float64) for _ in range(4)]
    plan = pr.plan(model, data[0][:2], target=pr.Params(0.7))
    return model, pr.shrink(model, plan), plan, data


@pytest.mark.parametrize("name", CASES)
def test_equals_a_pass_for_each_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, walked, plan, data = _pruned(name)
    single = copy.deepcopy(walked)
    by_walk = pr.reconstruct(walked, model, data, plan, ridge=1e-3)
    monkeypatch.setattr(importlib.import_module("prunella.recovery.reconstruct"), "LIVE", 0)
    by_pass = pr.reconstruct(single, model, data, plan, ridge=1e-3)
    assert [fit.name for fit in by_walk.fits] == [fit.name for fit in by_pass.fits]
    assert any(fit.after < 0.9 * fit.before for fit in by_walk.fits)
    for key, value in single.state_dict().items():
        torch.testing.assert_close(walked.state_dict()[key], value, rtol=1e-9, atol=1e-9)


class Counted(list[Any]):
    """Batches that count how often they are read."""

    readings = 0

    def __iter__(self) -> Any:
        self.readings += 1
        return super().__iter__()


def test_the_data_is_read_once_more_than_the_first_batch() -> None:
    model, small, plan, data = _pruned("norms")
    counted = Counted(data)
    assert len(pr.reconstruct(small, model, counted, plan).fits) > 3
    assert counted.readings == 2


def test_a_constant_goes_into_the_mean_of_the_norm_behind() -> None:
    """A unit that is constant: without it, a convolution without a bias still gives the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)
    )
    model = _noisy_norms(model).double().eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 2.0
    data = [torch.randn(32, 2, 4, 4, dtype=torch.float64) for _ in range(3)]
    keep = torch.tensor([True, False, True, True])
    plan = pr.plan(model, data[0], target=pr.Params(0.97), only=["0"])
    assert torch.equal(plan.keep["0"], keep)
    small = pr.shrink(model, plan)
    pr.reconstruct(small, model, data, plan, ridge=0.0)
    torch.testing.assert_close(small(data[0]), model(data[0]), rtol=1e-8, atol=1e-8)


def test_a_norm_that_is_not_alone_in_reading_the_output_takes_no_constant() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu())
            return self.head((self.norm(y) + y.abs()).mean((2, 3)))

    torch.manual_seed(0)
    model = Both().double().eval()
    data = [torch.randn(8, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    plan = pr.plan(model, data[0], target=pr.Params(0.6), only=["a"])
    small = pr.shrink(model, plan)
    (fit,) = [fit for fit in pr.reconstruct(small, model, data, plan).fits if fit.name == "b.weight"]
    assert fit.after < fit.before
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)


def test_no_thread_outlives_an_error() -> None:
    model, small, plan, data = _pruned("norms")
    data[2] = data[2] * torch.nan
    before = threading.active_count()
    with pytest.raises(CheckFailed, match="not finite"):
        pr.reconstruct(small, model, data, plan)
    assert threading.active_count() == before


def test_an_error_of_the_model_is_raised_where_the_walk_was_asked() -> None:
    def fails() -> None:
        raise ValueError("the model's own")

    paused = PausedPass(fails, [])
    with pytest.raises(ValueError, match="the model's own"):
        paused.next()
    paused.close()


def test_a_walk_runs_under_the_autocast_of_its_caller() -> None:
    layer, seen = nn.Linear(4, 4), list[torch.dtype]()
    with torch.autocast("cpu", torch.bfloat16):
        paused = PausedPass(lambda: seen.append(layer(torch.randn(2, 4)).dtype), [])
    assert paused.next() is None
    assert seen == [torch.bfloat16]


def test_autocast_inside_of_the_model_holds_for_its_layers() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.a(x).relu()).float()

    torch.manual_seed(0)
    model, data = Half().eval(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    plan = pr.plan(model, data[0], target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    (fit,) = pr.reconstruct(small, model, data, plan).fits
    assert fit.after < fit.before
