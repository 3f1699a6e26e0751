"""A pruned language model generates with its cache what it computes without one, also when it was stored and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella
from prunella.targets import Params
from tests.oracle import settle

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

DECODER = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GROUPED = {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENDLESS = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, **ENDLESS}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, **ENDLESS, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, **ENDLESS}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDLESS},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
        | {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {
            "decoder_start_token_id": 2,
            "eos_token_id": None,
            "forced_eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
}
PROMPT = torch.tensor([[5, 17, 33, 8], [40, 2, 2, 9]])
STEPS = 12


def build(name: str) -> Any:
    kind, config, sizes = FAMILIES[name]
    torch.manual_seed(0)
    model = settle(getattr(hf, kind)(getattr(hf, config)(**sizes)))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):  # in their order: a set has another each time
            parameter.copy_(torch.randn(parameter.shape) / 4)  # wide enough for words that are not all the same
    return model


def example(model: Any) -> dict[str, Any]:
    more = {"decoder_input_ids": PROMPT[:, :3]} if model.config.is_encoder_decoder else {}
    return {"input_ids": PROMPT, "use_cache": False, **more}


Written = tuple[Tensor, Tensor]
"""The words, and the logits of each step."""


def with_cache(model: Any) -> Written:
    """What `generate` writes, greedily and with its cache."""
    options = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = model.generate(PROMPT, max_new_tokens=STEPS, use_cache=True, **options)
    return found.sequences, torch.stack(found.logits, 1)


def step_by_step(model: Any) -> Written:
    """The same without a cache and without `generate`: the whole text again for every token."""
    both, logits = model.config.is_encoder_decoder, []
    text = torch.full((2, 1), model.config.decoder_start_token_id) if both else PROMPT
    with torch.no_grad():
        for _ in range(STEPS):
            named = {"input_ids": PROMPT, "decoder_input_ids": text} if both else {"input_ids": text}
            logits.append(model(**named, use_cache=False).logits[:, -1])
            text = torch.cat([text, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return text, torch.stack(logits, 1)


def assert_same(one: Written, other: Written) -> None:
    """The same words, and logits that are the same, and not of every step."""
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4)
    assert float(one[1].diff(dim=1).abs().max()) > 0.1


def pruned(model: nn.Module, *, even: bool, describable: bool) -> tuple[prunella.Plan, Any]:
    allocation = prunella.uniform if even else prunella.global_
    recipe = prunella.Recipe(
        prunella.criteria.random,
        (prunella.Channel(), prunella.Head()),
        allocation=allocation,
        equal_widths=even and describable,  # heads of the others would be kept dense
        seed=4,
    )
    plan = prunella.plan(model, example(model), recipe, target=Params(0.75))
    return plan, prunella.shrink(model, plan)


def assert_cut(plan: prunella.Plan) -> None:
    """Heads and neurons went, of more than one group each."""
    removed = {(row.kind, row.name) for row in plan.rows if row.kept < row.total}
    assert {kind for kind, _ in removed} == {"head", "channel"} and len(removed) >= 3


@pytest.mark.parametrize("even", [True, False], ids=["uniform", "global"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_changes_nothing(name: str, even: bool, tmp_path: Path) -> None:
    model = build(name)
    assert_same(with_cache(model), step_by_step(model))
    plan, small = pruned(model, even=even, describable=name not in UNSAYABLE)
    assert_cut(plan)
    written = with_cache(small)
    assert_same(written, step_by_step(small))
    saved = prunella.save(small, tmp_path / "out", plan=plan, dense=model)
    assert_same(with_cache(prunella.load(tmp_path / "out")), written)
    if saved.reader == "from_pretrained":
        assert_same(with_cache(type(model).from_pretrained(tmp_path / "out").eval()), written)
    assert saved.reader == ("prunella.load" if name in UNSAYABLE or not even else "from_pretrained"), saved.note


UNSAYABLE = frozenset({"bart", "gpt2", "qwen2"})
"""Families whose configuration has no word for the width of a head, so that it cannot say an even cut of heads."""
