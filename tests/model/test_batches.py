"""Batches as loaders give them, and losses as detectors have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunella as pr
from prunella.errors import RequestError
from prunella.model.forward import forward, inputs_of
from tests.graphs import convnet, images, square_loss

IMAGES = images(3)
X = IMAGES[0]


def loader(kind: str) -> Any:
    x = torch.cat(IMAGES)
    if kind == "list":
        return DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=2)
    if kind == "regression":
        return DataLoader(TensorDataset(x, torch.randn_like(x)), batch_size=2)
    if kind == "three":
        return [(batch, torch.zeros(2), ["a", "b"]) for batch in IMAGES]
    return [({"input": batch}, torch.zeros(2)) for batch in IMAGES]


LOADERS = ("list", "regression", "three", "mapping")
USES: dict[str, Callable[[Any], Any]] = {
    "recalibrate_bn": lambda data: pr.recalibrate_bn(model := convnet(), data) and model.state_dict(),
    "reconstruct": lambda data: pr.reconstruct(cut(), dense(), data, plan()).fits,
    "fold_means": lambda data: pr.recovery.fold_means(cut(), dense(), data, plan()).folds,
    "correct_statistics": lambda data: pr.recovery.correct_statistics(cut(), dense(), data, plan=plan()),
    "agreement": lambda data: pr.search.agreement(dense(), data)(cut()),
    "distill": lambda data: pr.distill(cut(), dense(), data, steps=2, lr=1e-3).loss,
    "apoz": lambda data: pr.plan(dense(), X, pr.Recipe(pr.criteria.apoz), target=pr.MACs(0.5), data=data).keep,
    "scan": lambda data: (
        pr.search.scan(
            pr.search.space(dense(), X, pr.Recipe(pr.criteria.apoz), data=data),
            lambda model: pr.search.agreement(dense(), data)(model),
            ratios=(0.5,),
        ).curves
    ),
}


def dense() -> nn.Module:
    return convnet().eval()


def plan() -> pr.Plan:
    return pr.plan(dense(), X, target=pr.MACs(0.5))


def cut() -> nn.Module:
    return pr.shrink(dense(), plan())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("use", USES)
def test_labels_beside_the_inputs_change_nothing(use: str, kind: str) -> None:
    assert same(USES[use](loader(kind)), USES[use](IMAGES))


def test_a_labeled_batch_is_an_example_too() -> None:
    batch = next(iter(loader("list")))
    made = pr.plan(dense(), batch, target=pr.MACs(0.5))
    assert same(dict(made.keep), dict(plan().keep))
    assert torch.equal(pr.shrink(dense(), made)(X), cut()(X))


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self, optional: bool) -> None:
        super().__init__()
        self.layer, self.optional = nn.Linear(4, 3), optional

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x * mask)


class Optional(Two):
    """Its second input may be left out."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.layer(x if mask is None else x * mask)


class Listed(nn.Module):
    """Takes one list."""

    def forward(self, images: list[Tensor]) -> Tensor:
        assert isinstance(images, list)
        return torch.stack(images)


def test_what_the_model_takes_decides() -> None:
    x, mask = torch.randn(2, 4), torch.ones(2, 4)
    model = Two(False)
    assert torch.equal(forward(model, (x, mask)), forward(model, [x, mask]))
    assert forward(Listed(), [x, mask]).shape == (2, 2, 4)
    assert inputs_of(model, [x, mask]) == (x, mask) and inputs_of(convnet(), [X, mask]) is X
    assert isinstance(inputs_of(Listed(), [x, mask]), list)
    with pytest.raises(RequestError, match="batch of type list"):
        forward(Optional(True), [x, mask])  # the second entry may be an input or a label


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Two(False), (X, X, X)),
        (Two(False), {"x": X, "labels": X}),
        (convnet(), {"input": X, "labels": X}),
        (nn.DataParallel(Two(False)), {"x": X}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(model: nn.Module, batch: Any) -> None:
    with pytest.raises(RequestError, match="the model cannot be called on a batch of type") as caught:
        forward(model, batch)
    assert "argument" in caught.value.why and "loss=" in caught.value.todo


class Faulty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("mine")


def test_a_type_error_of_the_model_itself_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="mine"):
        forward(Faulty(), X)


class Detector(nn.Module):
    """Returns losses in training mode and results in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = convnet(), nn.Dropout(0.5)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        y = self.drop(self.body(x))
        if not self.training:
            return [{"boxes": row} for row in y]
        assert targets is not None
        return {"loss": (y - targets).square().mean(), "other": y.square().mean()}


def detection_loss(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack([*model(*batch).values()]).sum()


def test_a_loss_of_the_training_mode_scores_without_noise_or_new_statistics() -> None:
    torch.manual_seed(0)
    model, data = Detector().eval(), [(x, torch.ones(2, 4)) for x in IMAGES]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = pr.Recipe(pr.taylor)

    def plain(body: nn.Module, batch: Any) -> Tensor:
        y = body(batch[0])
        return (y - batch[1]).square().mean() + y.square().mean()

    made = pr.plan(model, X, recipe, target=pr.MACs(0.5), data=data, loss=detection_loss)
    expected = pr.plan(model.body, X, recipe, target=pr.MACs(0.5), data=data, loss=plain)
    assert {k.removeprefix("body."): v.tolist() for k, v in made.keep.items()} == {
        k: v.tolist() for k, v in expected.keep.items()
    }
    assert not any(module.training for module in model.modules()) and same(dict(model.state_dict()), before)


def test_recovery_runs_with_a_loss_of_the_training_mode() -> None:
    model, data = Detector().eval(), [(x, torch.ones(2, 4)) for x in IMAGES]
    made = pr.plan(model, X, target=pr.MACs(0.5))
    small = pr.shrink(model, made)
    assert pr.recalibrate_bn(small, data, loss=detection_loss) == ("body.1", "body.4")
    fitted = pr.reconstruct(small, model, data, made, loss=detection_loss)
    assert fitted.fits and not any(fit.skipped for fit in fitted.fits)
    assert not any(module.training for module in [*small.modules(), *model.modules()])


def test_a_loss_that_fails_in_both_modes_keeps_its_first_error() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("train" if model.training else "eval")

    model = dense()
    with pytest.raises(KeyError, match="eval"):
        pr.plan(model, X, pr.Recipe(pr.taylor), target=pr.MACs(0.5), data=[X], loss=broken)
    assert not model.training
    assert pr.plan(model, X, pr.Recipe(pr.taylor), target=pr.MACs(0.5), data=[X], loss=square_loss).keep
