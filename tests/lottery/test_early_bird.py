"""Early-bird tickets on sequences of masks whose distances are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from tests.graphs import IMAGE, convnet


def masks(flipped: int, size: int = 20) -> dict[str, Tensor]:
    first = torch.zeros(size, dtype=torch.bool)
    first[:flipped] = True
    return {"a": first}


def test_the_distance_by_hand_and_free_of_the_size_of_layers() -> None:
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True, False])}
    b = {"x": torch.tensor([True, False, False, False]), "y": torch.tensor([False, True])}
    assert pr.lottery.mask_distance(a, b) == (1 / 4 + 1) / 2 and pr.lottery.mask_distance(a, a) == 0
    wide = [{**one, "x": one["x"].repeat(100)} for one in (a, b)]
    assert pr.lottery.mask_distance(*wide) == pr.lottery.mask_distance(a, b)
    with pytest.raises(pr.PruningError, match="not of the same layers"):
        pr.lottery.mask_distance(a, {"x": a["x"]})


def test_it_fires_at_the_exact_epoch() -> None:
    #          distances:   .5   .05   .05  .05  .05  .2   .05  .05  .05  .05  .05
    sequence = [0, 10, 11, 12, 13, 14, 18, 19, 18, 17, 16, 15]
    bird = pr.lottery.EarlyBird(lambda model: pytest.fail("not planned"))
    fired = [epoch for epoch, flipped in enumerate(sequence) if bird.observe(masks(flipped))]
    assert fired == [11] and bird.distances[5] == pytest.approx(0.2)


def test_the_threshold_is_strict_and_the_window_must_be_full() -> None:
    bird = pr.lottery.EarlyBird(lambda model: pytest.fail("not planned"), window=3, eps=0.1)
    assert not any(bird.observe(masks(flipped)) for flipped in (0, 2, 4, 6, 8))  # distances of 0.1 exactly
    still = pr.lottery.EarlyBird(lambda model: pytest.fail("not planned"), window=3)
    assert [still.observe(masks(4)) for _ in range(5)] == [False, False, False, True, True]


def test_channels_by_bn_scale_as_in_the_paper() -> None:
    model = convnet()
    recipe = pr.Recipe(pr.criteria.bn_scale, pr.Channel(), pr.global_)
    bird = pr.lottery.EarlyBird(
        lambda m: pr.plan(m, torch.zeros(IMAGE), recipe, target=pr.Params(0.6)), window=2, eps=0.01
    )
    drawn = []
    for epoch in range(5):
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.1, 1, 8).roll(epoch if epoch < 3 else 2))
        drawn.append(bird.step(model))
    assert [made is not None for made in drawn] == [False] * 4 + [True]
    assert drawn[4] is not None
    assert pr.shrink(model, drawn[4])(torch.zeros(IMAGE)).shape == (2, 4)


def test_masks_of_weights_will_do_and_knobs_are_checked() -> None:
    model = convnet()
    recipe = pr.Recipe(pr.magnitude, pr.Element())
    bird = pr.lottery.EarlyBird(lambda m: pr.plan(m, torch.zeros(IMAGE), recipe, target=pr.Sparsity(0.5)), window=1)
    assert bird.step(model) is None and bird.step(model) is not None
    with pytest.raises(pr.PruningError, match="window=0"):
        pr.lottery.EarlyBird(lambda m: pytest.fail("not planned"), window=0)
