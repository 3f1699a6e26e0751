"""What the examples share: the digits of scikit-learn, a small network, its accuracy."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from prunella.io.load import import_module

with suppress(ImportError):  # a torchvision that does not fit this torch would keep transformers from being imported
    import_module("torchvision")


def options(about: str | None) -> argparse.Namespace:
    """`--quick` for a run of seconds, `--out` for a folder that is kept."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of seconds, whose numbers mean nothing")
    parser.add_argument("--out", type=Path, help="where to write; by default a temporary folder")
    given = parser.parse_args()
    given.out = given.out or Path(tempfile.mkdtemp(prefix="prunella-"))
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 images of 8x8 to train on, and 297 to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def network(seed: int = 0, width: int = 32) -> nn.Sequential:
    """Two convolutions with normalizations, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of a batch."""
    return cross_entropy(model(batch[0]), batch[1])


def batches(data: TensorDataset, size: int = 64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The data in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    return [(x, y) for x, y in DataLoader(data, size, shuffle=True, generator=generator)]


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float = 1e-3) -> nn.Module:
    """A loop of one's own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for epoch in range(epochs):
        for batch in batches(data, seed=epoch):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Fraction of right answers."""
    images, labels = data.tensors
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
