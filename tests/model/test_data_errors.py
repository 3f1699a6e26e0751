"""Data that a model cannot take: an error says which batch and what it is, and weights are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, PruningError, RequestError
from prunella.model.batches import described
from tests.graphs import convnet, images, square_loss

GOOD = images(3)
X = GOOD[0]


def dense() -> nn.Module:
    return convnet().eval()


def plan() -> pr.Plan:
    return pr.plan(dense(), X, target=pr.MACs(0.5))


def cut() -> nn.Module:
    return pr.shrink(dense(), plan())


def scored(criterion: Any, loss: Any = None) -> Callable[[Any], Any]:
    return lambda data: pr.plan(dense(), X, pr.Recipe(criterion), target=pr.MACs(0.5), data=data, loss=loss)


USES: dict[str, Callable[[Any], Any]] = {
    "reconstruct": lambda data: pr.reconstruct(cut(), dense(), data, plan()),
    "of an iterator": lambda data: pr.reconstruct(cut(), dense(), iter(data), plan()),
    "recalibrate_bn": lambda data: pr.recalibrate_bn(dense(), data),
    "absorb_bn": lambda data: pr.recovery.absorb_bn(dense(), data),
    "fold_means": lambda data: pr.recovery.fold_means(cut(), dense(), data, plan()),
    "correct_statistics": lambda data: pr.recovery.correct_statistics(cut(), dense(), data, plan=plan()),
    "distill": lambda data: pr.distill(cut(), dense(), data, steps=3, lr=1e-3),
    "finetune": lambda data: pr.finetune(cut(), data, square_loss, steps=3, lr=1e-3),
    "statistics": scored(pr.criteria.apoz),
    "gradients": scored(pr.taylor, square_loss),
    "elimination": scored(pr.criteria.obs_units),
    "agreement": lambda data: pr.search.agreement(dense(), data),
    "solve_": lambda data: pr.llm.solve_(dense(), X, pr.llm.one_shot(pr.Element(), 0.5), data=data),
    "prune": lambda data: pr.prune(dense(), X, target=pr.MACs(0.5), data=data, recover="none"),
}


@pytest.mark.parametrize("use", USES)
def test_the_batch_that_does_not_fit_is_named(use: str) -> None:
    wrong = torch.cat([X, X], dim=1)
    with pytest.raises(BadInput, match="the model does not run on batch 2 of data=") as caught:
        USES[use]([*GOOD[:2], wrong])
    assert f"it is {described(wrong)}, batch 0 was {described(X)}" in caught.value.why
    assert "starts with 0.weight" in caught.value.why and "RuntimeError" in caught.value.why
    assert caught.value.exit_code == 3 and isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("batch", "kind", "said"),
    [
        (X.double(), RuntimeError, "float64"),
        (X.long(), RuntimeError, "int64"),
        ({"pixels": X}, RequestError, "a dict of pixels"),
        (None, TypeError, "NoneType"),
        (X[:0], BadInput, "has no samples"),
    ],
)
@pytest.mark.parametrize("use", ["reconstruct", "recalibrate_bn", "prune"])
def test_types_keys_and_empty_batches_are_told(use: str, batch: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(PruningError, match=said) as caught:
        USES[use]([batch])
    assert isinstance(caught.value, kind) and caught.value.todo


def test_a_batch_is_described_by_its_parts() -> None:
    parts = {"ids": torch.ones(2, 3).long(), "more": [torch.ones(()), "x"]}
    assert described(parts) == "a dict of ids 2x3 int64, more a list of one number float32, str"
    assert described([X] * 8).endswith("and 2 more") and described(()) == "a tuple of nothing"


def test_the_error_of_a_user_function_outside_of_the_model_stays_as_it_is() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        model(batch)
        raise KeyError("label")

    with pytest.raises(KeyError) as caught:
        pr.finetune(cut(), GOOD, loss, steps=1, lr=0.1)
    assert not isinstance(caught.value, PruningError)


def test_an_error_of_the_example_is_told_before_anything_is_measured() -> None:
    with pytest.raises(BadInput, match="the model does not run on the example inputs"):
        pr.report(dense(), cut(), X.double())


# -- in place ------------------------------------------------------------------------------------------------------


def breaking_off(count: int) -> Iterator[Tensor]:
    """Batches, and an error after so many."""
    yield from GOOD[:count]
    raise OSError("the disk is gone")


class Breaking:
    """Breaks off in the pass of that number over it."""

    def __init__(self, good: int) -> None:
        self.good, self.passes = good, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(GOOD) if self.passes <= self.good else breaking_off(2)


IN_PLACE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "reconstruct": lambda small, data: pr.reconstruct(small, dense(), data, plan()),
    "fold_means": lambda small, data: pr.recovery.fold_means(small, dense(), data, plan()),
    "correct_statistics": lambda small, data: pr.recovery.correct_statistics(small, dense(), data, plan=plan()),
    "recalibrate_bn": lambda small, data: pr.recalibrate_bn(small, data, sequential=True),
    "absorb_bn": lambda small, data: pr.recovery.absorb_bn(small, data),
}


@pytest.mark.parametrize("good", [1, 2, 3, 4])
@pytest.mark.parametrize("use", IN_PLACE)
def test_after_an_error_the_weights_are_as_before(use: str, good: int) -> None:
    small = cut()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    try:
        IN_PLACE[use](small, Breaking(good))
    except OSError:
        after = small.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    else:
        assert good > 1  # so many passes were enough


@pytest.mark.parametrize("use", IN_PLACE)
def test_an_iterator_gives_what_its_list_gives(use: str) -> None:
    one, other = cut(), cut()
    IN_PLACE[use](one, GOOD)
    IN_PLACE[use](other, iter(GOOD))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_callback_that_raises_leaves_no_layer_refitted() -> None:
    small, fits = cut(), list[str]()
    before = {name: value.clone() for name, value in small.state_dict().items()}

    def stop(fit: Any, done: int, total: int) -> None:
        fits.append(fit.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pr.reconstruct(small, dense(), GOOD, plan(), on_fit=stop)
    assert fits and all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
