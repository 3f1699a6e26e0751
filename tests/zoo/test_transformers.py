"""Transformers from small configurations: heads and neurons go exactly, and generation still works."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle import Checked, Group, check_exact, frozen_because, masked, produced_by
from tests.vision import timm_or_skip

hf: Any = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 24}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
VIT = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 5}
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT = {
    **ENDLESS,
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "initializer_range": 0.3,
}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 24}
TOKENS = torch.tensor([[3, 7, 1, 9, 4, 2], [8, 5, 6, 11, 30, 12]])


@dataclass(frozen=True)
class Family:
    """A class with its configuration; `heads` and `neurons`: producers in layer 0 with the number of units."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    heads: Mapping[str, int]
    neurons: Mapping[str, int]
    stream: tuple[str, int]
    layer: str

    def build(self, implementation: str = "sdpa") -> nn.Module:
        """The model with random weights."""
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**self.sizes, attn_implementation=implementation)
        model: nn.Module = getattr(hf, self.model)(config)
        return model


def llama_like(name: str) -> Family:
    return Family(
        f"{name}ForCausalLM",
        f"{name}Config",
        {**SIZES, **ENDLESS, "num_key_value_heads": 2},
        {"self_attn.q_proj": 2, "self_attn.k_proj": 2, "self_attn.v_proj": 2},
        {"mlp.gate_proj": 48, "mlp.up_proj": 48},
        ("model.embed_tokens.weight", 1),
        "model.layers.0",
    )


def bert_like(name: str, task: str, prefix: str = "") -> Family:
    return Family(
        f"{name}{task}",
        f"{name}Config",
        SIZES,
        {"attention.self.query": 4, "attention.self.key": 4, "attention.self.value": 4},
        {"intermediate.dense": 48},
        (f"{prefix}embeddings.word_embeddings.weight", 1),
        f"{prefix}encoder.layer.0",
    )


FAMILIES = {
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        VIT,
        {"attention.q_proj": 4, "attention.v_proj": 4},
        {"mlp.fc1": 48},
        ("vit.embeddings.patch_embeddings.projection.weight", 0),
        "vit.layers.0",
    ),
    "bert": bert_like("Bert", "Model"),
    "bert classifier": bert_like("Bert", "ForSequenceClassification", "bert."),
    "roberta": bert_like("Roberta", "Model"),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        DISTIL,
        {"attention.q_lin": 4},
        {"ffn.lin1": 48},
        ("embeddings.word_embeddings.weight", 1),
        "transformer.layer.0",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT,
        {"attn.c_attn": 4},
        {"mlp.c_fc": 128},
        ("transformer.wpe.weight", 1),
        "transformer.h.0",
    ),
    "llama": llama_like("Llama"),
    "qwen2": llama_like("Qwen2"),
    "mistral": llama_like("Mistral"),
}


def inputs_of(family: Family) -> dict[str, Any]:
    """The example that a user would pass."""
    if family.model.startswith("ViT"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if family.model.endswith(("ForCausalLM", "LMHeadModel")):
        return {"input_ids": TOKENS, "use_cache": False}
    mask = torch.ones_like(TOKENS)
    mask[1, 4:] = 0
    return {"input_ids": TOKENS, "attention_mask": mask}


def everywhere(checked: Checked, part: str, layer: str) -> list[Group]:
    """The groups of one part in layer 0 and layer 1."""
    return [produced_by(checked.graph, f"{layer[:-1]}{i}.{part}") for i in (0, 1)]


# The hand-written attention is the same code in the other families.
RUNS = [(name, "sdpa") for name in FAMILIES] + [(name, "eager") for name in ("bert", "gpt2", "llama")]


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_heads_and_neurons_go_exactly(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    checked = check_exact(family.build(implementation), inputs_of(family))
    assert checked.moved > 1e-4
    for kind, parts in (("head", family.heads), ("channel", family.neurons)):
        for part, size in parts.items():
            groups = everywhere(checked, part, family.layer)
            assert [(g.size, g.kind) for g in groups] == [(size, kind)] * 2, part
            assert groups[0].name != groups[1].name, f"{part}: the layers need not go together"
    assert len({produced_by(checked.graph, f"{family.layer}.{p}").name for p in family.heads}) == 1
    assert len({produced_by(checked.graph, f"{family.layer}.{p}").name for p in family.neurons}) == 1
    assert frozen_because(checked.graph, *family.stream, "norm", "mean", "var", "pow", "output of the model")


def test_every_freezing_has_a_reason() -> None:
    checked = check_exact(FAMILIES["llama"].build(), inputs_of(FAMILIES["llama"]))
    assert not checked.graph.frozen, "every axis of a language model is of some kind"
    assert all(group.why and group.where for group in checked.graph.groups if group.kind in {"width", "vocabulary"})
    (width,) = [group for group in checked.graph.groups if group.kind == "width"]
    assert width.why == "a mean is taken over it" and "modeling_llama.py:" in width.where


def test_grouped_queries_keep_whole_heads_and_their_ratio() -> None:
    checked = check_exact(FAMILIES["llama"].build(), inputs_of(FAMILIES["llama"]))
    before = checked.dense.model.layers[0].self_attn
    after = checked.small.model.layers[0].self_attn
    assert (after.head_dim, after.scaling) == (before.head_dim, before.scaling)
    assert after.q_proj.out_features == 2 * after.k_proj.out_features < before.q_proj.out_features
    assert after.q_proj.out_features % after.head_dim == 0
    assert after.num_key_value_groups == before.num_key_value_groups


def test_gpt2_layers_are_linear_with_a_transposed_weight() -> None:
    checked = check_exact(FAMILIES["gpt2"].build(), inputs_of(FAMILIES["gpt2"]), fraction=0.5)
    layer = next(x for x in checked.graph.layers if x.entity == "transformer.h.0.mlp.c_fc.weight")
    assert (layer.op, layer.out_axis, layer.in_axis) == ("linear", 1, 0)
    attention = checked.small.transformer.h[0].attn
    assert attention.split_size == attention.c_proj.weight.shape[0] == attention.c_attn.weight.shape[1] // 3 == 16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_equals_the_masked_model(name: str) -> None:
    family = FAMILIES[name]
    checked = check_exact(family.build(), inputs_of(family))
    replica = masked(checked.dense, checked.graph, checked.keep, mode="readers")
    tokens = [generate(m) for m in (checked.small, replica, checked.dense)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2]) and tokens[0].unique().numel() > 3


def generate(model: Any) -> torch.Tensor:
    """Ten greedy tokens with the key-value cache."""
    mask = torch.ones_like(TOKENS)
    options = {"do_sample": False, "max_new_tokens": 10, "use_cache": True, "pad_token_id": 0}
    found: torch.Tensor = model.generate(TOKENS, attention_mask=mask, **options)[:, TOKENS.shape[1] :]
    return found


def timm_vit() -> nn.Module:
    """A vision transformer of timm in small."""
    timm = timm_or_skip()
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_timm_vit(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = Path(sys.prefix) / "vision"  # torchvision may be installed there, out of the way of transformers
    if aside.is_dir():
        monkeypatch.syspath_prepend(str(aside))
    model = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    checked = check_exact(model, torch.randn(2, 3, 32, 32))
    assert checked.moved > 1e-6
    for i in (0, 1):
        heads, neurons = (produced_by(checked.graph, f"blocks.{i}.{part}") for part in ("attn.qkv", "mlp.fc1"))
        assert (heads.size, heads.kind, neurons.size, neurons.kind) == (4, "head", 128, "channel")
        assert checked.small.blocks[i].attn.num_heads == int(checked.keep[heads.name].sum())
    assert frozen_because(checked.graph, "patch_embed.proj.weight", 0, "norm")
