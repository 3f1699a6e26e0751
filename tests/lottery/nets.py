"""A tiny problem with everything that can make a run unrepeatable: shuffling, dropout, momentum, noise, a schedule."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunella as pr

STEPS = 14
"""Of one training: two passes over the data and a part of a third."""


def data(count: int = 48) -> TensorDataset:
    """Points and labels."""
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, (x[:, :3].sum(1) > 0).long())


def net(seed: int = 0) -> nn.Sequential:
    """With batch normalization and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.ReLU(),
        nn.Linear(12, 2),
    )  # fmt: skip


def fit(model: nn.Module, session: pr.lottery.Session) -> None:
    """A loop of a user's own, which draws from every global generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9], gamma=0.5)
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    for x, y in session.steps(loader, optimizer, schedule):
        noisy = x + 0.01 * random.random() + 0.01 * float(np.random.rand())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(noisy), y).backward()
        optimizer.step()
        schedule.step()


def loss_of(model: nn.Module) -> float:
    """Mean loss over the data: an error, lower is better."""
    x, y = data().tensors
    return nn.functional.cross_entropy(model(x), y).item()


def spec(**changes: int) -> pr.lottery.TrainingSpec:
    """The whole training; quality is minus the loss."""
    return pr.lottery.TrainingSpec(
        fit, changes.get("steps", STEPS), lambda model: -loss_of(model), seed=changes.get("seed", 3)
    )


def batch() -> Tensor:
    """An example."""
    return data().tensors[0][:2]
