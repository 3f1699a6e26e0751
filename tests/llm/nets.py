"""Tiny language models, all of them random, with blocks that do something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

hf: Any = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "head_dim": 8}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {k: v for k, v in SIZES.items() if k != "head_dim"}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 6, "num_experts_per_tok": 2}),
}


def language_model(name: str = "llama", **more: Any) -> Any:
    """A model with random weights, the same each time."""
    torch.manual_seed(0)
    kind, config, sizes = FAMILIES[name]
    model = getattr(hf, kind)(getattr(hf, config)(**{**sizes, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
    return model


def windows(count: int = 4, *, length: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Random tokens."""
    rng = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 61, (4, length), generator=rng), "use_cache": False} for _ in range(count)]


def logits(model: nn.Module, batch: Any) -> Tensor:
    """Of one batch."""
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


def generates_as_without_a_cache(model: Any, steps: int = 6) -> None:
    """`generate` with its cache writes what the whole text, run again for every token, gives."""
    text = torch.tensor([[5, 17, 33, 8]])
    with torch.no_grad():
        written = model.generate(text, max_new_tokens=steps, do_sample=False, use_cache=True)
        for _ in range(steps):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, text)


def silent(model: Any, *blocks: int) -> Any:
    """The model with these blocks adding nothing."""
    with torch.no_grad():
        for k in blocks:
            model.model.layers[k].self_attn.o_proj.weight.zero_()
            model.model.layers[k].mlp.down_proj.weight.zero_()
    return model
