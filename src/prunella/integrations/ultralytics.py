"""A callback for the trainers of Ultralytics (YOLO), which would build the dense network again before they train."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from prunella.errors import CheckFailed, RequestError
from prunella.integrations.session import Gradual, PruningSession

_EVENTS = ("on_pretrain_routine_start", "on_train_start", "on_train_end")


class UltralyticsPruning:
    """Train a pruned network in the loop of Ultralytics, and hold its masks; with `gradual`, prune while it trains.

    `YOLO.train` builds the network of its configuration and copies the weights that fit: a smaller network becomes the
    dense one again, silently. This callback gives the trainer the network itself, and checks that it trains that one.
    Masked weights are exactly 0 after each optimizer step, in the moving average as well.

        yolo = YOLO("yolov8n.pt")
        plan = pr.plan(yolo.model, images, recipe, target=pr.MACs(0.7))
        UltralyticsPruning(pr.shrink(yolo.model, plan)).attach(yolo)
        yolo.train(data="coco8.yaml", epochs=50)

    model: the smaller network, or None to train the one that Ultralytics builds. gradual: how to prune in training, in
    optimizer steps. A checkpoint of Ultralytics is a pickle of the whole network, so that what it saves is the smaller
    one with its masks; a training that is resumed from it starts its schedule again.
    """

    def __init__(self, model: nn.Module | None = None, gradual: Gradual | None = None) -> None:
        self.model, self.session = model, PruningSession(gradual)
        self._shapes: dict[str, torch.Size] = {}
        self._hook: Any = None

    def attach(self, yolo: Any) -> Any:
        """Add the callback to a `YOLO`, which then predicts, validates and exports with the smaller network too."""
        if not callable(getattr(yolo, "add_callback", None)):
            why = f"{type(yolo).__name__} has no add_callback"
            raise RequestError("this is not a model of Ultralytics", why, "for example YOLO('yolov8n.pt')")
        for event in _EVENTS:
            yolo.add_callback(event, getattr(self, event))
        if self.model is not None:
            yolo.model, yolo.predictor = self.model, None
        return yolo

    def on_pretrain_routine_start(self, trainer: Any) -> None:
        """Give the trainer the network where it would build one."""
        if self.model is not None:
            trainer.get_model = partial(self._network, trainer)

    def _network(self, trainer: Any, *_: Any, **options: Any) -> nn.Module:
        """The network for `trainer.get_model`. Errors: RequestError for data with another number of classes."""
        assert self.model is not None
        own, classes = _classes(self.model), trainer.data.get("nc")
        if own is not None and classes is not None and own != classes:
            why = f"it has {own}, and the data {classes}"
            todo = "train the dense network on this data first, then prune that"
            raise RequestError("the pruned network has another number of classes", why, todo)
        return self.model.requires_grad_(True)

    def on_train_start(self, trainer: Any) -> None:
        """Hold the masks of the network and of its moving average."""
        average = getattr(getattr(trainer, "ema", None), "ema", None)
        self.session.averages = () if average is None else (average,)
        steps = math.ceil(len(trainer.train_loader) / max(1, trainer.accumulate)) * trainer.epochs
        self.session.start(trainer.model, trainer.optimizer, steps)
        self._hook = trainer.optimizer.register_step_post_hook(lambda *_: self.session.step())
        self._shapes = {name: value.shape for name, value in trainer.model.named_parameters()}
        wanted = self._shapes if self.model is None else {n: p.shape for n, p in self.model.named_parameters()}
        if wanted != self._shapes:
            why = "the trainer has another network than the one that it was given"
            raise CheckFailed("the pruned network is not trained", why, "give it to YOLO.train of one process")

    def on_train_end(self, trainer: Any) -> None:
        """Release the optimizer. The masks remain with the network."""
        if self._hook is not None:
            self._hook.remove()
        self.session.stop()


def _classes(model: nn.Module) -> int | None:
    """The number of classes that the last part of a network says; None if it does not."""
    for module in reversed(list(model.modules())):
        if isinstance(number := getattr(module, "nc", None), int):
            return number
    return None
