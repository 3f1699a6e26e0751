"""Width of language models from scores to a folder: FLAP with biases, SliceGPT, Minitron, REAP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.planning import recipes
from tests.llm.nets import generates_as_without_a_cache, language_model, logits, windows


def constant_neurons(model: Any) -> Any:
    """Neurons 40 and on always give the same: their gate and up read a constant that the norm gives, its scale 0."""
    with torch.no_grad():
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[40:] = 0
                layer.bias[40:] = 2.0
    return model


def test_means_go_into_biases_that_the_configuration_gains(tmp_path: Any) -> None:
    plain, data = language_model(), windows(3)
    model = pr.io.with_biases(plain)
    assert torch.equal(logits(model, data[0]), logits(plain, data[0]))
    assert model.config.mlp_bias and model.config.attention_bias and not plain.config.mlp_bias
    assert model.model.layers[1].mlp.down_proj.bias.shape == (32,) and plain.model.layers[1].mlp.down_proj.bias is None
    constant_neurons(model)
    plan = pr.plan(model, data[0], recipes.flap(), target=pr.Sparsity(8 / 48), data=data, only=["model.layers.*.mlp.*"])
    assert all(not bool(keep[40:].any()) for keep in plan.keep.values())
    small = pr.shrink(model, plan)
    assert not torch.allclose(logits(small, data[0]), logits(model, data[0]), atol=0.1)
    pr.recovery.fold_means(small, model, data, plan)
    other = windows(1, seed=8)[0]
    assert torch.allclose(logits(small, other), logits(model, other), atol=1e-4)
    generates_as_without_a_cache(small)
    assert pr.save(small, tmp_path / "out", plan=plan, dense=model).reader == "from_pretrained"
    again = type(plain).from_pretrained(tmp_path / "out")
    assert again.config.mlp_bias and torch.equal(logits(again, other), logits(small, other))


def test_flap_over_all_layers_does_not_see_the_scale_of_a_layer() -> None:
    model, data = language_model(), windows(3)

    def kept(recipe: pr.Recipe) -> list[list[bool]]:
        target = pr.Sparsity(0.3)
        plan = pr.plan(model, data[0], recipe, target=target, data=data, only=["model.layers.*.mlp.*"])
        return [keep.tolist() for keep in plan.keep.values()]

    plain = replace(recipes.flap_global(), allocation=pr.global_)
    before, raw = kept(recipes.flap_global()), kept(plain)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight *= 10  # nothing but the output comes after it
    assert kept(recipes.flap_global()) == before and kept(plain) != raw
    assert len({sum(keep) for keep in before}) > 1  # layers differ in width


def test_only_the_switch_that_is_needed_is_turned_on() -> None:
    model = pr.io.with_biases(language_model(), ["*down_proj"])
    assert model.config.mlp_bias and not model.config.attention_bias
    assert model.model.layers[0].self_attn.o_proj.bias is None


def test_models_without_a_word_for_it_are_refused() -> None:
    with pytest.raises(NotSupported, match=r"model\.layers\.0\.mlp\.down_proj cannot have a bias"):
        pr.io.with_biases(language_model("qwen2"), ["*down_proj"])
    with pytest.raises(RequestError, match="matches no linear layer"):
        pr.io.with_biases(language_model(), ["*nothing*"])
    with pytest.raises(NotSupported, match="not a model of transformers"):
        pr.io.with_biases(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_sliced_stream_loses_little_where_it_is_empty_and_generates(name: str, tmp_path: Any) -> None:
    model, data = language_model(name), windows(3)
    done = pr.llm.slice_stream(model, data[0], data, sparsity=0.25)
    assert done.model.get_input_embeddings().weight.shape == (61, 24) and "24 of 32 directions" in str(done)
    kept = done.plan.keep[done.rotated.group]
    assert bool(kept[:20].all())  # neighbors in energy may change places between two ways to measure it
    scale = dict(done.model.named_parameters())[done.rotated.scales[0]]
    assert torch.allclose(scale, torch.full_like(scale, (32 / 24) ** 0.5))
    generates_as_without_a_cache(done.model)
    if name == "llama":
        saved = pr.save(done.model, tmp_path / "out", plan=done.plan, dense=done.rotated.model)
        assert saved.reader == "from_pretrained"


def test_minitron_ranks_neurons_heads_and_the_stream_by_their_activations() -> None:
    model, data = language_model(), windows(2)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight[8:] *= 1e-3  # the second key-value group says nearly nothing
            block.mlp.up_proj.weight[36:] *= 1e-3
    plan = pr.plan(model, data[0], recipes.minitron(), target=pr.Sparsity(0.25), data=data)
    kinds = {row.kind for row in plan.rows if row.kept < row.total}
    assert kinds == {"channel", "head", "width"}
    assert all(not bool(keep[36:].any()) for name, keep in plan.keep.items() if len(keep) == 48)
    assert all(keep.tolist() == [True, False] for name, keep in plan.keep.items() if len(keep) == 2)
    small = pr.shrink(model, plan)
    assert small.model.embed_tokens.weight.shape == (61, 24)
    generates_as_without_a_cache(small)


def test_experts_that_nobody_needs_go_and_the_rest_generates(tmp_path: Any) -> None:
    model, data = language_model("mixtral"), windows(3)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj[[1, 4]] *= 1e-6
    plan = pr.plan(model, data[0], recipes.reap_experts(), target=pr.Sparsity(2 / 6), data=data)
    assert len(plan.keep) == 5
    assert all(keep.tolist() == [True, False, True, True, False, True] for keep in plan.keep.values())
    small = pr.shrink(model, plan)
    assert small.model.layers[0].mlp.experts.down_proj.shape[0] == 4
    generates_as_without_a_cache(small)
    assert pr.save(small, tmp_path / "out", plan=plan, dense=model).reader == "from_pretrained"
