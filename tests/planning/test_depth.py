"""Blocks that are named, and the run that turns the stream least, against angles read directly here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.planning.depth import find_blocks, turns
from tests.llm.nets import generates_as_without_a_cache, language_model, logits, silent, windows


def streams(model: Any, batch: Any) -> list[torch.Tensor]:
    """What enters each block, and what leaves the last."""
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hooks = [b.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())) for b in model.model.layers]
        hooks.append(model.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())))
        model(**batch)
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("last", [False, True])
def test_angles_are_those_between_what_enters_and_what_leaves(last: bool) -> None:
    model, data = language_model(), windows(2)
    found = turns(find_blocks(model, data[0]), data, last=last)
    per_batch = [streams(model, batch) for batch in data]
    for start, stop in ((0, 0), (1, 3), (2, 4)):
        angles = []
        for seen in per_batch:
            one, other = seen[start].double(), seen[stop + 1].double()
            rows = [(s, t) for s in range(one.shape[0]) for t in range(one.shape[1]) if not last or t == 15]
            for s, t in rows:
                a, b = one[s, t], other[s, t]
                angles.append(math.acos(float(a @ b) / float(a.norm() * b.norm())) / math.pi)
        assert float(found.angle[start, stop]) == pytest.approx(sum(angles) / len(angles), abs=1e-4)
    assert bool(torch.isinf(found.angle.tril(-1)[1:, 0]).all()) and found.angle.shape == (5, 5)
    best = min(range(3), key=lambda k: float(found.angle[k, k + 2]))
    assert found.run(3) == tuple(f"model.layers.{k}" for k in range(best, best + 3))


def test_blocks_that_add_nothing_go_first_as_a_run_and_nothing_changes() -> None:
    model, data = silent(language_model(), 2, 3), windows(2)
    plan = pr.llm.drop_run(model, data[0], data, count=2)
    assert plan.dropped == {"model.layers": ("2", "3")}
    small = pr.shrink(model, plan)
    assert torch.allclose(logits(small, data[1]), logits(model, data[1]), atol=1e-5)
    assert small.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_named_blocks_go_and_the_rest_generates(name: str, tmp_path: Any) -> None:
    model, data = language_model(name), windows(1)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.3", "model.layers.1"])
    small = pr.shrink(model, plan)
    replica = language_model(name)
    for k in (1, 3):
        replica.model.layers[k].register_forward_hook(lambda module, args, output: args[0])
    assert torch.allclose(logits(small, data[0]), logits(replica, data[0]), atol=1e-5)
    assert plan.got == pytest.approx(0.4) and "4/5" not in str(plan) and "3/5" in str(plan)
    generates_as_without_a_cache(small)
    assert pr.save(small, tmp_path / "out", plan=plan, dense=model).reader == "from_pretrained"
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, data[0]), logits(small, data[0]))


def test_a_look_without_blocks_shares_the_weights() -> None:
    model, data = language_model(), windows(1)
    blocks = find_blocks(model, data[0])
    look = blocks.without(["model.layers.1"])
    assert look.model.layers[1].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    assert len(model.model.layers) == 5 and model.config.num_hidden_layers == 5
    small = pr.shrink(model, blocks.plan(["model.layers.1"]))
    assert torch.equal(logits(look, data[0]), logits(small, data[0]))


def test_what_cannot_be_dropped_is_said() -> None:
    model, data = language_model(), windows(1)
    with pytest.raises(RequestError, match=r"layers\.9 is not a prunable block"):
        pr.llm.drop_blocks(model, data[0], ["model.layers.9"])
    with pytest.raises(RequestError, match="no block is named"):
        pr.llm.drop_blocks(model, data[0], [])
    with pytest.raises(RequestError, match="a run of 5 blocks"):
        pr.llm.drop_run(model, data[0], data, count=5)
    with pytest.raises(NotSupported, match="no block to drop"):
        pr.llm.drop_blocks(torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.randn(2, 3), ["0"])
