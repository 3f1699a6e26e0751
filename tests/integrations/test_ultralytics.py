"""Ultralytics' trainer gets the pruned network in place of the dense one that it would build."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import CheckFailed, RequestError
from prunella.integrations import UltralyticsPruning

EVENTS = ("on_pretrain_routine_start", "on_train_start", "on_train_end")


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))
    model[-1].nc = 2  # type: ignore[assignment]
    return model


class Trainer:
    """The order of calls of `BaseTrainer`: the callbacks of the start come before the network is built."""

    def __init__(self, callbacks: dict[str, list[Callable[[Any], None]]], *, classes: int = 2) -> None:
        self.callbacks, self.epochs, self.accumulate, self.data = callbacks, 2, 2, {"nc": classes}
        self.train_loader = [torch.randn(2, 3, 8, 8) for _ in range(8)]
        self._run("on_pretrain_routine_start")
        self.model: Any = "network.yaml"

    def _run(self, event: str) -> None:
        for callback in self.callbacks.get(event, []):
            callback(self)

    def get_model(self, cfg: object = None, weights: object = None, verbose: bool = True) -> nn.Module:
        return network()

    def train(self) -> None:
        self.model = self.get_model(cfg=self.model, weights=None, verbose=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.ema = type("Ema", (), {"ema": copy.deepcopy(self.model)})()
        self._run("on_train_start")
        for number, x in enumerate(self.train_loader * self.epochs):
            self.model(x).square().mean().backward()
            if number % self.accumulate:
                self.optimizer.step()
                self.optimizer.zero_grad()
                for mine, theirs in zip(self.ema.ema.parameters(), self.model.parameters(), strict=True):
                    mine.data.lerp_(theirs.data, 0.1)
        self._run("on_train_end")


class Yolo:
    """What the callback needs of a `YOLO`."""

    def __init__(self) -> None:
        self.model: nn.Module = network()
        self.predictor: object = object()
        self.callbacks: dict[str, list[Callable[[Any], None]]] = {}

    def add_callback(self, event: str, callback: Callable[[Any], None]) -> None:
        self.callbacks.setdefault(event, []).append(callback)


def smaller() -> nn.Module:
    dense = network().eval()
    return pr.shrink(dense, pr.plan(dense, torch.randn(1, 3, 8, 8), target=pr.MACs(0.5)))


def test_the_pruned_network_is_trained() -> None:
    small, yolo = smaller(), Yolo()
    before = [p.detach().clone() for p in small.parameters()]
    UltralyticsPruning(small).attach(yolo)
    assert yolo.model is small and yolo.predictor is None and tuple(yolo.callbacks) == EVENTS
    trainer = Trainer(yolo.callbacks)
    trainer.train()
    assert trainer.model is small
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


def test_masks_are_held_in_the_network_and_its_average() -> None:
    masked = network().eval()
    pr.apply_(
        masked, pr.plan(masked, torch.randn(1, 3, 8, 8), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.6))
    )
    zeros = masked[0].weight == 0
    yolo = Yolo()
    UltralyticsPruning(masked).attach(yolo)
    trainer = Trainer(yolo.callbacks)
    trainer.train()
    for model in (trainer.model, trainer.ema.ema):
        assert torch.equal(model[0].weight == 0, zeros)


def test_it_prunes_while_it_trains() -> None:
    gradual = pr.integrations.Gradual(
        pr.Recipe(granularity=pr.Element()), pr.Sparsity(0.8), torch.randn(1, 3, 8, 8), steps=6, every=2
    )
    yolo = Yolo()
    UltralyticsPruning(gradual=gradual).attach(yolo)
    trainer = Trainer(yolo.callbacks)
    trainer.train()
    weights = [p for name, p in trainer.model.named_parameters() if name.endswith("weight")]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert zeros == pytest.approx(0.8, abs=0.01)
    average = [p for name, p in trainer.ema.ema.named_parameters() if name.endswith("weight")]
    assert all(torch.equal(a == 0, b == 0) for a, b in zip(average, weights, strict=True))


def test_other_classes_other_networks_and_other_objects_are_refused() -> None:
    yolo = Yolo()
    UltralyticsPruning(smaller()).attach(yolo)
    with pytest.raises(RequestError, match="it has 2, and the data 80"):
        Trainer(yolo.callbacks, classes=80).train()
    trainer = Trainer({"on_train_start": yolo.callbacks["on_train_start"]})
    with pytest.raises(CheckFailed, match="the pruned network is not trained"):
        trainer.train()
    with pytest.raises(RequestError, match="not a model of Ultralytics"):
        UltralyticsPruning().attach(network())
