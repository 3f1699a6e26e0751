"""Blocks chosen one at a time by a measured quality, against all that could have been chosen."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import BadInput, RequestError
from tests.llm.nets import generates_as_without_a_cache, language_model, logits, silent, windows
from tests.stopping import stops_at, tick


def without(model: Any, *paths: str) -> Any:
    """A copy of the model that has no such blocks, made by hand."""
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(b for k, b in enumerate(small.model.layers) if f"model.layers.{k}" not in paths)
    return small


def test_each_block_is_the_one_that_costs_least_and_the_plan_drops_them() -> None:
    model, data = language_model(num_hidden_layers=4), windows(2)
    quality = pr.search.agreement(model, data, logits=True)
    seen: dict[frozenset[str], float] = {}
    found = pr.search.greedy_blocks(
        model, data[0], quality, count=2, on_try=lambda pruned, v: seen.update({frozenset(pruned): v})
    )
    paths = [f"model.layers.{k}" for k in range(4)]
    direct = {p: quality(without(model, p)) for p in paths}
    first = max(paths, key=lambda p: direct[p])
    after = {p: quality(without(model, first, p)) for p in paths if p != first}
    second = max(after, key=lambda p: after[p])
    assert found.paths == (first, second) and found.tried == 7
    assert found.values == pytest.approx((direct[first], after[second]), rel=1e-5)
    assert seen[frozenset([first, second])] == found.values[1] and len(seen) == 7
    assert set(found.plan.dropped["model.layers"]) == {first[-1], second[-1]}
    small = pr.shrink(model, found.plan)
    assert quality(small) == pytest.approx(after[second], rel=1e-5)
    generates_as_without_a_cache(small)
    assert len(model.model.layers) == 4 and first in str(found)


def test_a_loss_sees_what_the_influence_does_not() -> None:
    model, data = language_model(), windows(2)
    with torch.no_grad():  # block 1 turns the stream a little, and block 3 not at all but scales it
        for k in (1, 2):
            model.model.layers[k].self_attn.o_proj.weight.mul_(0.05)
            model.model.layers[k].mlp.down_proj.weight.mul_(0.05)
    few = pr.search.greedy_blocks(
        model, data[0], pr.search.agreement(model, data, logits=True), count=1, data=data, among=2
    )
    assert few.tried == 2 and few.paths[0] in ("model.layers.1", "model.layers.2")
    worst = pr.search.greedy_blocks(
        model, data[0], lambda m: -pr.search.agreement(model, data, logits=True)(m), count=1, data=data, among=2
    )
    assert {few.paths[0], worst.paths[0]} == {"model.layers.1", "model.layers.2"}


def test_a_search_that_was_stopped_goes_on_with_the_same_result(tmp_path: Path) -> None:
    model, data = language_model(num_hidden_layers=4), windows(1)
    agreement = pr.search.agreement(model, data, logits=True)

    def quality(small: nn.Module) -> float:
        tick()
        return agreement(small)

    whole = pr.search.greedy_blocks(model, data[0], quality, count=2)
    with stops_at(5):
        pr.search.greedy_blocks(model, data[0], quality, count=2, folder=tmp_path)
    rest = pr.search.greedy_blocks(model, data[0], quality, count=2, folder=tmp_path)
    assert (rest.paths, rest.values, rest.tried) == (whole.paths, whole.values, 3)
    assert pr.search.greedy_blocks(model, data[0], quality, count=2, folder=tmp_path).tried == 0
    assert pr.search.greedy_blocks(model, data[0], quality, count=3, folder=tmp_path).tried == 2
    other = silent(language_model(num_hidden_layers=4), 1)
    with pytest.raises(RequestError, match="not continued"):
        pr.search.greedy_blocks(other, data[0], quality, count=2, folder=tmp_path)


def test_equal_blocks_go_in_their_order_and_the_model_is_as_it_was() -> None:
    model, data = silent(language_model(num_hidden_layers=4), 1, 3), windows(1)
    before = logits(model, data[0])
    found = pr.search.greedy_blocks(model, data[0], lambda m: 1.0, count=2)
    assert found.paths == ("model.layers.0", "model.layers.1")
    assert torch.equal(logits(model, data[0]), before)
    best = pr.search.greedy_blocks(model, data[0], pr.search.agreement(model, data, logits=True), count=2)
    assert set(best.paths) == {"model.layers.1", "model.layers.3"} and best.values[-1] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_searched_is_said() -> None:
    model, data = language_model(num_hidden_layers=2), windows(1)
    with pytest.raises(RequestError, match="cannot drop so many"):
        pr.search.greedy_blocks(model, data[0], lambda m: 1.0, count=2)
    with pytest.raises(RequestError, match="among= needs data="):
        pr.search.greedy_blocks(model, data[0], lambda m: 1.0, count=1, among=2)
    with pytest.raises(BadInput, match="not a number"):
        pr.search.greedy_blocks(model, data[0], lambda m: math.nan, count=1)
