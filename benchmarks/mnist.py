"""LeNet-300-100 on MNIST: the network, the data in memory, and one small training loop for all benchmarks.

The images are `mnist.npz` in `$PRUNELLA_DATA`, or in `../shared/data` beside the repository: arrays `train_x` and
`test_x` (N, 28, 28) of bytes, `train_y` and `test_y` (N,).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

MEAN, STD = 0.1307, 0.3081
FILE = "mnist.npz"
Hook = Callable[[int], object]
"""Called after every step of the optimizer with its number from 0, for example `lambda step: pruner.step()`."""
Setup = Callable[[nn.Module, Optimizer], Hook]
"""Called once with the model and its optimizer before the first step, for example to make a `Pruner`; gives a hook."""


@dataclass(frozen=True)
class Digits:
    """Images as rows of 784 numbers of mean 0 and deviation 1 (over the training set), and labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, seed: int, *, epochs: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of the training set, the last short one of an epoch left out."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_y), generator=generator)
            for chosen in order[: len(order) // size * size].split(size):
                yield self.train_x[chosen], self.train_y[chosen]


def data_file() -> Path:
    """Where the images should be."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PRUNELLA_DATA", beside)) / FILE


def load(*, train: int | None = None) -> Digits:
    """The whole set, or the first `train` images of training and the whole test. FileNotFoundError without it."""
    with np.load(data_file(), allow_pickle=False) as packed:
        parts = {name: torch.from_numpy(packed[name]) for name in ("train_x", "train_y", "test_x", "test_y")}
    images = {n: ((parts[n].flatten(1).float() / 255) - MEAN) / STD for n in ("train_x", "test_x")}
    return Digits(images["train_x"][:train], parts["train_y"][:train].long(), images["test_x"], parts["test_y"].long())


def lenet(seed: int, sizes: tuple[int, ...] = (784, 300, 100, 10)) -> nn.Sequential:
    """Fully connected with ReLU between, Glorot-normal weights, biases of zero: 266,200 weights at the usual sizes."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for read, made in pairwise(sizes):
        linear = nn.Linear(read, made)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, as `prunella.plan` takes it."""
    return cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    lr: float = 0.1,
    seed: int = 0,
    batch: int = 100,
    weight_decay: float = 5e-4,
    setup: Setup | None = None,
) -> list[float]:
    """SGD with momentum 0.9 and a half cosine from `lr` to 0; the mean loss of each epoch.

    The order of the data depends on `seed` alone. `setup(model, optimizer)` attaches what prunes and gives a hook.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    after = setup(model, optimizer) if setup else None
    each = len(data.train_y) // batch
    steps = epochs * each
    total = torch.zeros(epochs)
    model.train()
    for step, one in enumerate(data.batches(batch, seed, epochs=epochs)):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, one)
        value.backward()
        optimizer.step()
        total[step // each] += value.detach()
        if after:
            after(step)
    model.eval()
    return [float(value) for value in total / each]


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Percent of the test images that are named rightly."""
    model.eval()
    return 100 * float((model(data.test_x).argmax(1) == data.test_y).double().mean())
