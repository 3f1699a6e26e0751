"""Small models of transformers with random weights, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", SIZES),
    "Qwen2": ("ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "GPT2": ("LMHeadModel", {**OLD, "eos_token_id": 1}),
    "Mixtral": (
        "ForCausalLM",
        {**SIZES, "num_local_experts": 4},
    ),  # experts one by one in the files, stacked in the model
    "GptOss": ("ForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "Bert": ("ForMaskedLM", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


def write(folder: Path, kind: str = "Llama", *, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> nn.Module:
    """A model of three blocks in several shards, and the model as it is read back."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    suffix, sizes = KINDS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, kind + suffix)(getattr(transformers, f"{kind}Config")(**sizes)).to(dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    return read(folder, made)


def read(folder: Path, like: nn.Module) -> nn.Module:
    """Plain `from_pretrained`, with nothing missing or left over."""
    kind: Any = type(like)
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return found.eval()  # type: ignore[no-any-return]


def data(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 16), generator=generator)} for _ in range(count)]
