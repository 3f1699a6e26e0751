"""Heads and neurons of a language model: all that belongs to a unit is cut together, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.planning import recipes

transformers = pytest.importorskip("transformers")


def test_slices_go_together_and_the_result_is_the_masked_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (2, 12))
    data = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(3)]

    def loss(net: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return net(**batch, labels=batch["input_ids"]).loss  # type: ignore[no-any-return]

    plan = pr.plan(model, {"input_ids": tokens}, recipes.named("llm_pruner"), target=pr.Sparsity(0.5), data=data,
                   loss=loss)  # fmt: skip
    small = pr.shrink(model, plan)
    for layer in small.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.weight.shape == (16, 32) and attention.o_proj.weight.shape == (32, 16)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 32)
        assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (24, 32)
        assert mlp.down_proj.weight.shape == (32, 24)
    masked = pr.apply_(transformers.LlamaForCausalLM(config).eval(), plan)
    masked.load_state_dict(model.state_dict())
    pr.transform.reapply_(masked)
    with torch.no_grad():
        assert torch.allclose(small(tokens).logits, masked(tokens).logits, atol=1e-5)
        assert not torch.allclose(small(tokens).logits, model(tokens).logits, atol=1e-3)
    assert small.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
