"""The random number generators are seeded, kept and restored together."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from prunella.model.rng import restore_rng_, rng_state, seed_rng_, seeded


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_a_state_is_restored_in_every_generator() -> None:
    state = rng_state()
    first = draw()
    assert draw() != first
    restore_rng_(state)
    assert draw() == first


@pytest.mark.parametrize("seed", [0, 2**40])
def test_a_seed_decides_what_the_body_draws_and_the_caller_goes_on(seed: int) -> None:
    seed_rng_(7)
    alone = draw(), draw()
    seed_rng_(7)
    first = draw()
    with seeded(seed):
        inside = draw()
    with pytest.raises(KeyError), seeded(seed):
        assert draw() == inside
        raise KeyError
    assert (first, draw()) == alone


def test_without_a_seed_what_is_drawn_is_only_taken_back() -> None:
    seed_rng_(1)
    expected = draw()
    seed_rng_(1)
    with seeded(None):
        assert draw() == expected
    assert draw() == expected


def test_the_generator_of_a_loader_counts() -> None:
    loader = DataLoader(list(range(32)), shuffle=True, generator=torch.Generator())
    seed_rng_(3, loader)
    state = rng_state(loader)
    first = [int(x) for x in loader]
    restore_rng_(state, loader)
    assert [int(x) for x in loader] == first
    seed_rng_(3, loader)
    assert [int(x) for x in loader] == first
