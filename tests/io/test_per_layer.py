"""What the manifest says of each layer: a model built from it has that layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunella as pr

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
BATCH = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}


@pytest.mark.parametrize("deep", [False, True])
def test_each_layer_is_built_by_its_own_entries(tmp_path: Path, deep: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    granularities: Any = (pr.Channel(), pr.Head(), pr.Depth()) if deep else (pr.Channel(), pr.Head())
    plan = pr.plan(
        model, BATCH, pr.Recipe(pr.criteria.random, granularities, pr.global_, seed=1), target=pr.Sparsity(0.4)
    )
    assert bool(plan.dropped) == deep
    small = pr.shrink(model, plan)
    saved = pr.save(small, tmp_path / "small", plan=plan, dense=model)
    assert saved.reader == "prunella.load"
    entries = json.loads((tmp_path / "small" / "manifest.json").read_text())["per_layer_config"]
    assert entries and {key for layer in entries.values() for key in layer} <= SIZES.keys() - {"head_dim"}
    for k, layer in enumerate(small.model.layers):
        config = transformers.LlamaConfig(**{**SIZES, **entries.get(str(k), {}), "num_hidden_layers": 1})
        alone = transformers.LlamaForCausalLM(config).model.layers[0]
        wanted = {name: p.shape for name, p in layer.named_parameters()}
        assert {name: p.shape for name, p in alone.named_parameters()} == wanted
    assert torch.equal(pr.load(tmp_path / "small")(**BATCH).logits, small(**BATCH).logits)


@pytest.mark.parametrize(("share", "heads", "groups"), [(0.5, 4, 2), (0.25, 6, 3)])
def test_heads_that_go_are_not_taken_for_narrower_ones(tmp_path: Path, share: float, heads: int, groups: int) -> None:
    """Some of four key-value heads of four: shapes alone would allow a smaller head_dim."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    plan = pr.plan(model, BATCH, pr.Recipe(pr.criteria.random, pr.Head()), target=pr.Sparsity(share))
    pr.save(pr.shrink(model, plan), tmp_path / "small", plan=plan, dense=model)
    config = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, groups, 4)
