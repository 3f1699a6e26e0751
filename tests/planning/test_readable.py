"""`equal_widths` promises that plain `from_pretrained` reads the smaller model: it does, or the plan says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, PruningError, TargetMissed
from prunella.model.forward import outputs_of
from prunella.planning.parts import reads_itself

hf: Any = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 7, 1, 9, 4, 2], [8, 5, 6, 11, 30, 12]])
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 24, "initializer_range": 0.3}
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TEXT = {"input_ids": IDS, "use_cache": False}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, **ENDLESS}
GROUPED = {**SIZES, **ENDLESS, "num_key_value_heads": 2}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES, {"input_ids": IDS}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, TEXT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, TEXT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, TEXT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}, TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "decoder_start_token_id": 0, "tie_word_embeddings": False},
        {**TEXT, "decoder_input_ids": IDS[:, :5]},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 5},
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
}
UNITS: dict[str, Any] = {"width": pr.Width(), "channel": pr.Channel(), "head": pr.Head()}
UNITS |= {"all": (pr.Channel(), pr.Head(), pr.Width())}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    kind, config, sizes, inputs = FAMILIES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, kind)(getattr(hf, config)(**sizes)).eval()
    return model, inputs


def planned(name: str, units: Any, sparsity: float) -> tuple[nn.Module, dict[str, Any], pr.Plan]:
    model, inputs = build(name)
    recipe = pr.Recipe(pr.criteria.random, units, equal_widths=True)
    return model, inputs, pr.plan(model, inputs, recipe, target=pr.Sparsity(sparsity))


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return outputs_of(model, inputs)


CASES = [
    ("bert", "head", 0.21), ("gpt2", "all", 0.47), ("gpt2", "channel", 0.21), ("llama", "all", 0.21),
    ("llama", "width", 0.47), ("qwen2", "head", 0.47), ("mixtral", "width", 0.21), ("opt", "channel", 0.47),
    ("t5", "head", 0.21), ("vit", "all", 0.47),
]  # fmt: skip


@pytest.mark.parametrize(("name", "units", "sparsity"), CASES)
def test_plain_from_pretrained_reads_it_or_the_plan_is_refused(
    name: str, units: str, sparsity: float, tmp_path: Path
) -> None:
    try:
        model, inputs, plan = planned(name, UNITS[units], sparsity)
    except PruningError as error:
        assert isinstance(error, NotSupported | TargetMissed)
        assert "equal_widths" in str(error) or "there are no units to prune" in error.what
        assert "Config describes it" in str(error) or "there are no units to prune" in error.what
        return
    small = pr.shrink(model, plan)
    assert sum(row.kept < row.total for row in plan.rows) > 0
    saved = pr.save(small, tmp_path / "small", plan=plan, dense=model)
    assert saved.reader == "from_pretrained", saved.note
    again = type(model).from_pretrained(tmp_path / "small").eval()  # type: ignore[attr-defined]
    for one, other in zip(run(small, inputs), run(again, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_width_that_the_configuration_refuses_is_rounded() -> None:
    _, _, plan = planned("llama", pr.Width(), 0.3)
    (row,) = plan.rows
    assert row.kept % 4 == 0 and any("widths are multiples of" in line for line in plan.remarks)
    assert plan.recipe["round_to"] > 1, "the recipe of the plan gives this plan"


def test_heads_without_a_word_in_the_configuration_stay_with_the_reason() -> None:
    _, _, plan = planned("gpt2", (pr.Channel(), pr.Head()), 0.3)
    assert {row.kind for row in plan.rows} == {"channel"}
    (entry,) = [entry for entry in plan.frozen if entry.reason.startswith("equal_widths")]
    assert entry.entity == "transformer.h.0.attn.c_attn.weight" and "num_heads" in entry.reason


def test_the_pooler_stays_where_its_width_is_that_of_the_stream() -> None:
    _, _, plan = planned("bert", pr.Channel(), 0.3)
    assert [row.name for row in plan.rows] == ["bert.encoder.layer.0.intermediate.dense"]
    (entry,) = [entry for entry in plan.frozen if entry.reason.startswith("equal_widths")]
    assert entry.entity == "bert.pooler.dense.weight" and "no BertConfig describes it: " in entry.reason


def test_the_refusal_says_which_tensor_and_which_option_helps() -> None:
    with pytest.raises(NotSupported, match="plain from_pretrained would not read these widths") as caught:
        planned("gpt2", pr.Width(), 0.25)
    assert "no GPT2Config describes it: " in caught.value.why and "c_attn.weight" in caught.value.why
    assert "leave equal_widths out" in caught.value.todo
    model, inputs = build("gpt2")
    free = pr.plan(model, inputs, pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.25))
    assert pr.shrink(model, free), "and it does help"


def test_a_target_that_the_described_units_miss_names_the_option() -> None:
    model, inputs = build("gpt2")
    recipe = pr.Recipe(pr.criteria.random, (pr.Channel(), pr.Head()), equal_widths=True)
    with pytest.raises(TargetMissed) as caught:
        pr.plan(model, inputs, recipe, target=pr.Params(0.3))
    assert caught.value.todo.startswith("leave equal_widths out") and "no GPT2Config describes it" in str(caught.value)


def test_without_the_option_and_for_other_models_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunella.planning.readable import Builds

    def fail(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(Builds, "model", fail)
    model, inputs = build("gpt2")
    assert reads_itself(model) and pr.plan(model, inputs, pr.Recipe(pr.magnitude), target=pr.Sparsity(0.3))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert not reads_itself(net)
    assert pr.plan(net, torch.randn(2, 4), pr.Recipe(equal_widths=True), target=pr.Sparsity(0.5))
