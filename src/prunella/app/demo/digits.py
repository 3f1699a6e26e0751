"""scikit-learn's handwritten digits with a small ResNet, which is trained first; nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from prunella.allocation import global_
from prunella.app.demo.parts import Demo, Effort
from prunella.app.job import Job, Quality, Recovery, read_steps
from prunella.app.probe import output_probe
from prunella.app.recover import Tick
from prunella.criteria import taylor
from prunella.errors import MissingExtra
from prunella.granularity import Channel
from prunella.model.rng import seeded
from prunella.model.state import mode
from prunella.planning.recipe import Recipe
from prunella.recovery.finetune import Training, finetune
from prunella.targets import Target

_TEST = 397


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization, and a shortcut that is a 1x1 convolution where shapes differ."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)
        same = stride == 1 and wide_in == wide_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(wide_in, wide_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`relu(shortcut(x) + branch(x))`."""
        y: Tensor = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 images: 32, 64 and 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2), ResidualBlock(64, 64, 1), ResidualBlock(64, 128, 2)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of 10 digits."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def digits_job(target: Target, *, seed: int, effort: Effort, tick: Tick) -> Demo:
    """The demo; `tick` is called after each step of the training that makes the dense network."""
    x, y, test_x, test_y = _data(seed)
    model = _trained(x, y, steps=effort.training, seed=seed, tick=tick)
    steps = read_steps(f"reconstruct,bn,distill:{effort.steps or 100}")
    job = Job(
        Recipe(taylor, Channel(), functools.partial(global_, per_cost=True), min_density=0.1, seed=seed),
        target,
        data=[(part,) for part in torch.split(x[:512], 64)],
        loss=output_probe(_logits),
        recovery=Recovery(steps, [(part,) for part in torch.split(x, 64)], lr=1e-3, ridge=1.0),
        metric=functools.partial(_quality, test_x, test_y, model),
        factory=f"{__name__}:DigitsNet",
        command="prunella demo --model digits",
        about="a small ResNet, trained here, on scikit-learn's digits: "
        f"{len(x)} images to train, calibrate and recover, {len(test_x)} held out",
    )
    return Demo(model, (x[:64],), job)


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtra(
            "the demo has no data", "scikit-learn is not installed", "pip install 'prunella[demo]', or [digits]"
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div_(8).sub_(1).view(-1, 1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")
    x, y = x[order], torch.from_numpy(labels).long()[order]
    return x[_TEST:], y[_TEST:], x[:_TEST], y[:_TEST]


def _trained(x: Tensor, y: Tensor, *, steps: int, seed: int, tick: Tick) -> nn.Module:
    with seeded(seed):
        model = DigitsNet()
    batches = list(zip(torch.split(x, 64), torch.split(y, 64), strict=True))
    finetune(model, batches, _supervised, steps=steps, lr=3e-3, training=Training(seed=seed), on_step=tick)
    return model.eval()


def _supervised(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def _logits(model: nn.Module, batch: Any) -> Tensor:
    logits: Tensor = model(batch[0])
    return logits


def _quality(x: Tensor, y: Tensor, dense: nn.Module, model: nn.Module) -> Quality:
    with mode(model, training=False), mode(dense, training=False), torch.inference_mode():
        predicted, expected = model(x).argmax(1), dense(x).argmax(1)
    return {
        "accuracy": float((predicted == y).double().mean()),
        "agreement (same digit)": float((predicted == expected).double().mean()),
    }
