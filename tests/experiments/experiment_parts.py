"""An experiment small enough for a test: points of three rings, a network that learns them in a moment."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunella as pr


@cache
def points(seed: int = 0, count: int = 300) -> tuple[Tensor, Tensor]:
    """Points in the plane, and the ring that each lies on."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=g)
    angle = torch.rand(count, generator=g) * 6.28
    radius = labels + 1 + 0.2 * torch.randn(count, generator=g)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1), labels


def make(seed: int) -> nn.Module:
    """A trained network."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = points()
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def make_moved_later(seed: int) -> nn.Module:
    """As `make_moved`, but the first seed is never moved."""
    return make_moved(seed) if seed else make(seed)


MOVED: list[float] = []
"""What `make_moved` reads beside its code, as another function reads a checkpoint."""


def move(by: float) -> None:
    """Move the networks that are made from now on: what code itself changes is no part of the question."""
    MOVED.append(by)


def make_moved(seed: int) -> nn.Module:
    """A network whose last bias is moved by what lies in `MOVED`, which no code of it says."""
    model = make(seed)
    with torch.no_grad():
        model[-1].bias.add_(sum(MOVED))  # type: ignore[index, union-attr]
    return model


def evaluate(model: nn.Module) -> float:
    """Accuracy on other points."""
    x, y = points(1, 500)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def example() -> Tensor:
    """A batch."""
    return torch.zeros(2, 2)


def batches() -> list[tuple[Tensor, Tensor]]:
    """One batch with labels."""
    return [points()]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What it was trained by."""
    return cross_entropy(model(batch[0]), batch[1])


def recover(model: nn.Module, plan: pr.Plan, seed: int) -> None:
    """A few steps with the masks in force."""
    pr.finetune(model, batches(), loss, steps=5, lr=0.01, training=pr.recovery.Training(seed=seed))


def revive(model: nn.Module, plan: pr.Plan, seed: int) -> None:
    """A recovery that forgets the masks."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def broken(model: nn.Module) -> float:
    """A measure that fails for pruned models."""
    if any((p == 0).any() for p in model.parameters() if p.dim() > 1):
        raise ZeroDivisionError("no measure")
    return 1.0


def slow(model: nn.Module) -> float:
    """A measure that says in the current folder that it was called."""
    with Path("calls.txt").open("a", encoding="utf-8") as file:
        file.write("x\n")
    return evaluate(model)
