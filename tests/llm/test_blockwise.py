"""One-shot pruning block by block, against the same done by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import ModelBlock, blocks_of
from prunella.model.forward import forward
from prunella.model.masks import masks_of
from prunella.solvers import admm, by_score, sparsegpt


class Half(nn.Module):
    """A residual block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x + shift)))


class Net(nn.Module):
    """Three blocks between an embedding and a head."""

    def __init__(self, *, scaled: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(Half() for _ in range(3))
        self.last, self.scaled = nn.Linear(12, 4), scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x * 1.0 if self.scaled else x, torch.ones(12))
        out: Tensor = self.last(x)
        return out


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(30, 6, generator=generator) for _ in range(3)]


HOW = pr.llm.OneShot(pr.Element(), 0.5, partial(admm, damping=0.01))


@pytest.mark.parametrize("true_sequential", [True, False])
def test_it_is_the_layer_solver_on_what_reaches_each_layer_in_the_pruned_model(true_sequential: bool) -> None:
    model, hand = net(), net()
    how = replace(HOW, true_sequential=true_sequential)
    done = pr.llm.solve_(model, batches()[0], how, data=batches())
    with torch.no_grad():
        stream = [hand.first(batch) for batch in batches()]
        for block in hand.blocks:
            assert isinstance(block, Half)
            dense = copy.deepcopy(block)
            for layer, inputs in (
                (block.up, lambda x, b: x + 1),
                (block.down, lambda x, b: torch.relu(b.up(x + 1))),
            ):
                x = torch.cat([inputs(part, block if true_sequential else dense) for part in stream])
                layer.weight.copy_(admm(layer.weight, x.T @ x, sparsity=0.5).weight)
            stream = [block(part, torch.ones(12)) for part in stream]
    for name, value in model.state_dict().items():
        assert torch.allclose(value, hand.state_dict()[name], atol=1e-5), name
    assert done.sparsity == 0.5 and [fit.tokens for fit in done.fits[:6]] == [90] * 6
    assert [fit.name for fit in done.fits[:6]] == [f"blocks.{k}.{part}" for k in range(3) for part in ("up", "down")]
    assert [fit.name for fit in done.fits if fit.skipped] == ["first", "last"]


def test_sequential_blocks_and_passes_of_the_whole_model_give_the_same() -> None:
    sequential, whole = net(), net(scaled=True)
    found = [blocks_of(m, couple(m, batches()[0]), batches()[0], forward) for m in (sequential, whole)]
    assert found[0] == tuple(ModelBlock(f"blocks.{k}", k > 0) for k in range(3))
    assert found[1] == tuple(ModelBlock(f"blocks.{k}", False) for k in range(3))
    for model in (sequential, whole):
        pr.llm.solve_(model, batches()[0], HOW, data=batches())
    for a, b in zip(sequential.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_masks_are_remembered_and_survive_training() -> None:
    model = net()
    pr.llm.solve_(model, batches()[0], HOW, data=batches())
    masks = masks_of(model)
    assert sorted(masks) == sorted(f"blocks.{k}.{part}.weight" for k in range(3) for part in ("up", "down"))
    assert all(int((~mask).sum()) == 120 for mask in masks.values())
    pr.finetune(model, batches(), lambda m, b: m(b).square().mean(), steps=3, lr=1e-2)
    assert all(not bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_refining_brings_the_blocks_closer_and_keeps_the_zeros() -> None:
    dense, plain, refined = net(), net(), net()
    how = pr.llm.OneShot(pr.NM(2, 4), method=sparsegpt, refine=pr.llm.Refine(epochs=20, lr=5e-3))
    pr.llm.solve_(plain, batches()[0], pr.llm.OneShot(pr.NM(2, 4), method=sparsegpt), data=batches())
    done = pr.llm.solve_(refined, batches()[0], how, data=batches())
    assert len(done.refined) == 3 and all(after < before for before, after in done.refined.values())
    x = torch.cat(batches())
    with torch.no_grad():
        gaps = [float((model(x) - dense(x)).square().mean()) for model in (plain, refined)]
    assert gaps[1] < 0.7 * gaps[0]
    for name, mask in masks_of(refined).items():
        assert mask.view(-1, 4).sum(1).tolist() == [2] * (mask.numel() // 4)
        assert not bool(refined.get_parameter(name)[~mask].any())
    assert all(p.requires_grad and p.grad is None for p in refined.parameters())


def test_under_autocast_layers_meet_the_pruned_model_too() -> None:
    plain, coarse = net(), net()
    how = pr.llm.OneShot(pr.NM(2, 4), method=sparsegpt, refine=pr.llm.Refine(epochs=20, lr=5e-3))
    first = pr.llm.solve_(plain, batches()[0], how, data=batches())
    with torch.autocast("cpu", torch.bfloat16):
        second = pr.llm.solve_(coarse, batches()[0], how, data=batches())
    for name, (before, after) in first.refined.items():
        rough_before, rough_after = second.refined[name]
        assert abs(rough_before / before - 1) < 0.3 and abs(rough_after / after - 1) < 0.5


def test_a_model_without_blocks_is_one_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4))
    data = [torch.randn(5, 3, 6, 6) for _ in range(2)]
    done = pr.llm.solve_(model, data[0], pr.llm.OneShot(sparsity=0.4), data=data)
    fits = {fit.name: fit for fit in done.fits}
    assert [fit.skipped for fit in done.fits] == [""] * 3
    assert fits["0"].tokens == 2 * 5 * 16 and int((model[0].weight == 0).sum()) == round(0.4 * 8 * 27)
    assert fits["2"].tokens == 2 * 2 * 5 * 4  # of both groups
    assert [int((half == 0).sum()) for half in model[2].weight.chunk(2)] == [round(0.4 * 4 * 36)] * 2


def test_a_sparsity_for_each_layer_and_what_is_skipped() -> None:
    model = net()
    how = pr.llm.OneShot(
        sparsity={"blocks.0.up": 0.25, "blocks.1.down": 0.75}, method=partial(by_score, score=pr.wanda)
    )
    done = pr.llm.solve_(model, batches()[0], how, data=batches())
    assert {fit.name: fit.removed for fit in done.fits if not fit.skipped} == {"blocks.0.up": 60, "blocks.1.down": 180}
    with pytest.raises(RequestError, match="no layer"):
        pr.llm.solve_(net(), batches()[0], HOW, data=batches(), skip=["blocks"])
    with pytest.raises(RequestError, match="matches nothing"):
        pr.llm.solve_(net(), batches()[0], HOW, data=batches(), skip=["block_s"])


def test_a_shared_block_sees_all_its_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Half(), Half()])

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.blocks, *self.blocks):
                x = block(x, torch.ones(12))
            return x

    torch.manual_seed(0)
    model = Twice().eval()
    data = [torch.randn(7, 12) for _ in range(2)]
    done = pr.llm.solve_(model, data[0], HOW, data=data)
    assert {fit.tokens for fit in done.fits if not fit.skipped} == {28}


def test_a_language_model_is_pruned_and_still_generates() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = [torch.randint(0, 64, (2, 16)) for _ in range(3)]
    found = blocks_of(model, couple(model, {"input_ids": tokens[0]}), {"input_ids": tokens[0]}, forward)
    assert [block.path for block in found] == [f"model.layers.{k}" for k in range(3)]
    assert [block.sequential for block in found] == [False, True, True]
    done = pr.llm.solve_(model, {"input_ids": tokens[0]}, HOW, data=[{"input_ids": t} for t in tokens])
    assert done.sparsity == pytest.approx(0.5, abs=1e-3) and len([f for f in done.fits if not f.skipped]) == 21
    assert "lm_head" in str(done)
    assert model.generate(tokens[0][:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_one_shot_is_the_solver_and_the_refinement_together() -> None:
    how = pr.llm.one_shot(pr.NM(2, 4), epochs=20, lr=5e-3)
    assert how == pr.llm.OneShot(pr.NM(2, 4), 0.5, admm, pr.llm.Refine(20, 5e-3))
    rates = [pr.llm.one_shot(pr.Element(), sparsity).refine for sparsity in (0.5, 0.6, 0.7, {"a": 0.5, "b": 0.8})]
    assert [rate and rate.lr for rate in (*rates, pr.llm.one_shot(pr.NM(2, 8)).refine)] == [
        2e-3, 2e-3, 3e-3, 3e-3, 3e-3
    ]  # fmt: skip
    assert pr.llm.one_shot(epochs=0, sparsity=0.7) == pr.llm.OneShot(pr.Element(), 0.7, admm)
    dense, x, gaps = net(), torch.cat(batches()), []
    for one_shot in (pr.llm.OneShot(pr.NM(2, 4), method=sparsegpt), pr.llm.one_shot(pr.NM(2, 4), epochs=0), how):
        model = net()
        pr.llm.solve_(model, batches()[0], one_shot, data=batches())
        with torch.no_grad():
            gaps.append(float((model(x) - dense(x)).square().mean()))
    assert gaps[2] < 0.7 * gaps[0] and gaps[2] < 0.7 * gaps[1]


def test_a_cache_of_keys_and_values_does_not_reach_the_next_run_of_a_block() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=True)
    model = transformers.LlamaForCausalLM(config).eval()
    other = copy.deepcopy(model)
    tokens = [torch.randint(0, 64, (2, 12)) for _ in range(2)]
    pr.llm.solve_(model, {"input_ids": tokens[0]}, HOW, data=[{"input_ids": t} for t in tokens])
    pr.llm.solve_(other, {"input_ids": tokens[0]}, HOW, data=[{"input_ids": t, "use_cache": False} for t in tokens])
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model.config.use_cache


class Computed(nn.Module):
    """A block whose products take weights that its forward computes, and one that is read as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.randn(20, 12) / 4), nn.Parameter(torch.ones(20, 1))
        self.row, self.down = nn.Parameter(torch.randn(1, 20)), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(nn.functional.linear(x, self.up * self.scale))
        return x + self.down(h * self.row.expand(len(h), -1))


def test_a_weight_that_the_model_computes_with_first_is_named_with_that_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), Computed(), Computed()).eval()
    solving = pr.llm.solve_(model, batches()[0], pr.llm.one_shot(), data=batches())
    fits = {fit.name: fit.skipped for fit in solving.fits}
    assert not fits["1.down"] and "does not run" not in str(solving)
    assert fits["1.up"] == "mul reads it: no product takes the parameter itself"
    assert fits["1.row"].startswith("mul reads it") and fits["2.up"] == fits["1.up"]


class Expanded(nn.Module):
    """A block that multiplies by an expanded view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(20, 12) / 4), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.bmm(x, self.up.t().expand(len(x), 12, 20)).relu())


def test_a_weight_that_is_expanded_for_its_product_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), Expanded(), Expanded()).eval()
    data = [torch.randn(3, 8, 6) for _ in range(2)]
    fits = {fit.name: fit.skipped for fit in pr.llm.solve_(model, data[0], pr.llm.one_shot(), data=data).fits}
    assert fits["1.up"] == fits["2.up"] == "a product reads an expanded or reshaped view of it"
