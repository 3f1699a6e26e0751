"""Models of which a part is compiled: all works as for the bare model, and the part stays compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from tests.graphs import images

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, while it compiles a training step
DATA = images(2)
X = DATA[0]


class Net(nn.Module):
    """A stem, a block that may be compiled, and a head; with a matrix of its own above the block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.mix = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x).relu()).mean((2, 3)) @ self.mix


def part() -> nn.Module:
    model = net()
    model.block = torch.compile(model.block, backend="eager")
    return model


def layer() -> nn.Module:
    model = net()
    model.block[0] = torch.compile(model.block[0], backend="eager")
    return model


def in_place() -> nn.Module:
    model = net()
    model.compile(backend="eager")
    return model


def method() -> nn.Module:
    model: Any = net()
    model.forward = torch.compile(model.forward, backend="eager")
    return model  # type: ignore[no-any-return]


def net() -> Any:
    return Net().eval()


MODELS = {"part": part, "layer": layer, "in place": in_place, "method": method}
MASKS = pr.Recipe(granularity=pr.Element())


@cache
def plan() -> pr.Plan:
    return pr.plan(net(), X, target=pr.MACs(0.5))


@cache
def masks() -> pr.Plan:
    return pr.plan(net(), X, MASKS, target=pr.Sparsity(0.5))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in model.state_dict().items()}


def recalibrated(model: nn.Module, _: Path) -> Any:
    pr.recalibrate_bn(model, DATA)
    return state(model)


def fitted(model: nn.Module, _: Path) -> Any:
    small = pr.shrink(model, plan())
    return [str(fit) for fit in pr.reconstruct(small, model, DATA, plan()).fits], state(small)


def masked(model: nn.Module, _: Path) -> Any:
    pr.apply_(model, masks())
    kept = {name: mask.clone() for name, mask in pr.masks_of(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pr.Pruner(model, optimizer):
        for _step in range(2):
            loss(model, X).backward()
            optimizer.step()
    pr.finalize(model)
    return kept, state(model), dict(pr.masks_of(model))


USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "plan": lambda model, _: dict(pr.plan(model, X, target=pr.MACs(0.5)).keep),
    "taylor": lambda model, _: dict(
        pr.plan(model, X, pr.Recipe(pr.taylor), target=pr.MACs(0.5), data=DATA, loss=loss).keep
    ),
    "shrink": lambda model, _: state(pr.shrink(model, plan())),
    "masks": masked,
    "recalibrate_bn": recalibrated,
    "reconstruct": fitted,
    "prune": lambda model, _: state(
        pr.prune(model, X, target=pr.MACs(0.5), data=DATA, recover={"steps": 1}).model
    ),
    "save": lambda model, to: pr.save(model, to / "m", factory=net).files,
    "distill_features": lambda model, _: pr.recovery.distill_features(model, ["block.0"])(net(), X),
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.allclose(one, other, atol=1e-6)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@cache
def of_bare(use: str, folder: Path) -> Any:
    return USES[use](net(), folder)


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("use", USES)
def test_it_does_what_it_does_to_the_bare_model(
    use: str, form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = MODELS[form]()
    names = list(model.state_dict())
    with torch.no_grad():
        model(X)  # a program that was compiled before ignores hooks
    assert same(USES[use](model, tmp_path), of_bare(use, tmp_path_factory.getbasetemp() / use))
    assert list(model.state_dict()) == names  # the caller's model stays compiled
