"""Evolution over stored levels: the sparsity holds, the best of a small space is found, a killed search goes on."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.model.masks import masks_of
from prunella.search.evopress import Levels, evolve_levels
from tests.llm.test_blockwise import batches, net
from tests.stopping import stops_at, tick

AT = (0.25, 0.5, 0.75)


def uneven() -> nn.Module:
    """A net whose first block counts for far more than the others."""
    model = net()
    with torch.no_grad():
        model.blocks[0].down.weight.mul_(10)  # type: ignore[union-attr]
    return model


def levels() -> Levels:
    made = {}
    for s in AT:
        model = uneven()
        pr.llm.solve_(model, batches()[0], pr.llm.OneShot(sparsity=s), data=batches())
        made[s] = model
    return Levels(made)


def quality(model: nn.Module) -> float:
    tick()
    with torch.no_grad():
        x = torch.cat(batches())
        return -float((model(x) - uneven()(x)).square().mean())


def removed(model: nn.Module) -> int:
    return sum(int((~mask).sum()) for mask in masks_of(model).values())


def test_it_finds_the_best_of_all_choices_within_the_sparsity() -> None:
    stored = levels()
    found = evolve_levels(stored, 0.5, quality, generations=60, offspring=6)
    assert found.model is not None and removed(found.model) >= 0.5 * 6 * 240
    assert quality(found.model) == pytest.approx(found.value, rel=1e-6)
    assert sum(found.shares.values()) >= 3 and set(found.shares) == set(masks_of(found.model))
    model, best = copy.deepcopy(stored.models[0.25]), -float("inf")
    for choice in itertools.product(range(3), repeat=6):
        if sum(AT[k] for k in choice) >= 3:
            stored.put_(model, choice)
            best = max(best, quality(model))
    assert found.value == pytest.approx(best, rel=1e-6)
    assert found.value > quality(stored.models[0.5])


def test_weights_and_masks_are_those_of_their_level() -> None:
    stored, model = levels(), uneven()
    stored.put_(model, (0, 1, 2, 0, 1, 2))
    for k, (name, mask) in enumerate(sorted(masks_of(model).items())):
        source = stored.models[AT[k % 3]]
        assert model.get_parameter(name).equal(source.get_parameter(name)) and mask.equal(masks_of(source)[name])


def test_a_search_that_was_stopped_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    stored = levels()
    whole = evolve_levels(stored, 0.5, quality, generations=4, offspring=3)
    with stops_at(6):
        evolve_levels(stored, 0.5, quality, generations=4, offspring=3, folder=tmp_path)
    again = evolve_levels(stored, 0.5, quality, generations=4, offspring=3, folder=tmp_path)
    assert (again.shares, again.value) == (whole.shares, whole.value) and again.tried == whole.tried - 5
    with pytest.raises(pr.PruningError, match="not continued"):
        evolve_levels(stored, 0.5, quality, folder=tmp_path, seed=1)


def test_what_is_no_level_is_refused() -> None:
    stored = levels()
    for wrong in (
        lambda: Levels({0.5: stored.models[0.5]}),
        lambda: Levels({0.5: stored.models[0.5], 0.6: net()}),
        lambda: evolve_levels(stored, 0.6, quality),
        lambda: evolve_levels(stored, 0.5, quality, offspring=0),
    ):
        with pytest.raises(pr.PruningError):
            wrong()
