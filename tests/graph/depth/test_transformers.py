"""Layers of transformers models: found, dropped, generated with and without a cache, saved and read plainly."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.graph.depth.nets import bypass
from tests.oracle import distance, distinct, double, run, settle
from torch import nn

import prunella as pr
from prunella.graph.cut.changes import changes
from prunella.graph.cut.surgery import change_
from prunella.graph.solve.block_counters import counted
from prunella.graph.solve.groups import couple

hf: Any = pytest.importorskip("transformers")
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "max_position_embeddings": 48}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
LLAMA = {**SIZES, **ENDLESS, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 48, "vocab_size": 50, "initializer_range": 0.3}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
TOKENS = torch.tensor([[3, 7, 1, 9, 4, 2], [8, 5, 6, 11, 30, 12]])
IDS = {"input_ids": TOKENS}

FAMILIES: dict[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, IDS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT, **ENDLESS}, IDS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA, IDS),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**LLAMA, "num_hidden_layers": 6, "layer_types": KINDS, "sliding_window": 3},
        IDS,
    ),
    "bert": ("BertModel", "BertConfig", SIZES, IDS),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 5},
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {**IDS, "decoder_input_ids": TOKENS}),
}
STACKS = {
    "llama": {"model.layers": 4},
    "gpt2": {"transformer.h": 4},
    "qwen3": {"model.layers": 4},
    "gemma3": {"model.layers": 6},
    "bert": {"encoder.layer": 4},
    "vit": {"vit.layers": 4},
    "t5": {"encoder.block": 3, "decoder.block": 3},
}
COUNTS = {
    "llama": {(":config", "num_hidden_layers")},
    "gpt2": {(":config", "n_layer")},
    "qwen3": {(":config", "num_hidden_layers")},
    "gemma3": {(":config", "num_hidden_layers")},
    "bert": {(":config", "num_hidden_layers")},
    "vit": {(":config", "num_hidden_layers")},
    "t5": {
        (":config", "num_layers"),
        (":config", "num_decoder_layers"),
        ("encoder:config", "num_layers"),
        ("decoder:config", "num_layers"),
    },
}


def build(name: str) -> nn.Module:
    """The model with random weights, none of them trivial."""
    torch.manual_seed(0)
    kind, config, sizes, _ = FAMILIES[name]
    return settle(getattr(hf, kind)(getattr(hf, config)(**sizes)))


def cut(model: nn.Module, inputs: Any, pruned: Mapping[str, int]) -> nn.Module:
    """A copy without one block of each of these stacks."""
    graph = counted(model, couple(model, inputs), inputs)
    keep = {s.name: torch.arange(s.size) != pruned[s.name] for s in graph.stacks if s.name in pruned}
    small = copy.deepcopy(model)
    change_(small, changes(graph, keep))
    assert distinct(small) == graph.params(keep)
    return small


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_found_and_what_counts_them(name: str) -> None:
    model, inputs = build(name), FAMILIES[name][3]
    graph = counted(model, couple(model, inputs), inputs)
    assert {s.name: s.size for s in graph.stacks} == STACKS[name]
    stacks = set(STACKS[name])
    assert {(a.owner, a.name) for a in graph.attributes if stacks & {n for n, _ in a.extent.units}} == COUNTS[name]
    lists = {place for places in graph.lists.values() for place in places}
    assert lists == ({(":config", "layer_types")} if name in ("gemma3", "qwen3") else set())
    assert [f.entity for f in graph.rooted] == (["encoder.block.0", "decoder.block.0"] if name == "t5" else [])
    assert all("read outside the block" in f.reason for f in graph.rooted)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_is_bypassed(name: str) -> None:
    model, inputs = build(name).double(), double(FAMILIES[name][3])
    graph = couple(model, inputs)
    for pruned in (0, 1):
        small = cut(model, inputs, dict.fromkeys(STACKS[name], pruned))
        expected = run(bypass(model, [stack.paths[pruned] for stack in graph.stacks]), inputs)
        found = run(small, inputs)
        assert distance(found, expected) <= 1e-9
        assert distance(found, run(model, inputs)) > 1e-4


def test_albert_shares_one_layer_and_keeps_it() -> None:
    sizes = {**SIZES, "embedding_size": 16}
    graph = couple(settle(hf.AlbertModel(hf.AlbertConfig(**sizes))), IDS)
    assert not graph.stacks and all("runs 4 times" in f.reason for f in graph.rooted) and graph.rooted


def greedy(model: nn.Module, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding without a cache, by hand."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_generation_with_a_cache_is_that_without_and_that_of_the_bypassed(name: str) -> None:
    model = build(name)
    stack = next(iter(STACKS[name]))
    small: Any = cut(model, IDS, {stack: 1})
    made = small.generate(TOKENS, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(made, greedy(small, TOKENS, 8))
    assert torch.equal(made, greedy(bypass(model, [f"{stack}.1"]), TOKENS, 8))
    fixed = small.generate(TOKENS, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(made, fixed)


def test_plain_from_pretrained_reads_a_llama_without_two_of_six(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settle(hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 6})))
    plan = pr.plan(model, IDS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.3))
    small = pr.shrink(model, plan)
    assert small.config.num_hidden_layers == len(small.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2, 3]
    saved = pr.save(small, tmp_path / "a", plan=plan, dense=model)
    assert saved.reader == "from_pretrained" and not saved.note
    torch.save({"out": run(small, IDS)[0]}, tmp_path / "expected.pt")
    code = (
        "import tests.conftest, torch, transformers, prunella; ids = torch.tensor({ids}); "
        "expected = torch.load({expected!r})['out']; "
        "plain = transformers.LlamaForCausalLM.from_pretrained({folder!r}).eval(); "
        "assert plain.config.num_hidden_layers == 4; "
        "assert all(torch.allclose(m(ids).logits, expected, atol=1e-6) for m in (plain, prunella.load({folder!r})))"
    ).format(ids=TOKENS.tolist(), expected=str(tmp_path / "expected.pt"), folder=str(tmp_path / "a"))
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "bert", "vit", "t5"])
def test_plain_from_pretrained_reads_the_others(name: str, tmp_path: Path) -> None:
    model, inputs = build(name), FAMILIES[name][3]
    plan = pr.plan(model, inputs, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.3))
    small = pr.shrink(model, plan)
    assert pr.save(small, tmp_path / "a", plan=plan, dense=model).reader == "from_pretrained"
    assert distance(run(pr.load(tmp_path / "a"), inputs), run(small, inputs)) == 0


def test_widths_that_differ_are_read_by_load(tmp_path: Path) -> None:
    model = build("gemma3")
    granularities = (
        pr.Channel(pr.granularity.Reduce.MEAN),
        pr.Head(pr.granularity.Reduce.MEAN),
        pr.Depth(pr.granularity.Reduce.MEAN),
    )
    plan = pr.plan(model, IDS, pr.Recipe(pr.magnitude, granularities, pr.global_), target=pr.MACs(0.6))
    assert plan.dropped and plan.cuts and 0.4 < plan.got <= 0.6
    small = pr.shrink(model, plan)
    pr.save(small, tmp_path / "a", plan=plan, dense=model)
    again: Any = pr.load(tmp_path / "a")
    assert distance(run(again, IDS), run(small, IDS)) == 0
    assert again.config.layer_types == small.config.layer_types
    made = again.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, greedy(small, TOKENS, 6))
