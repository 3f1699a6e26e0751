"""Low-rank adapters, and recovering a pruned model toward the dense one without labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import CheckFailed, RequestError
from prunella.recovery.adapters import LowRankAdapter
from tests.llm.nets import generates_as_without_a_cache, language_model, logits, windows


def test_an_adapter_is_a_low_rank_change_that_starts_at_nothing() -> None:
    model, data = language_model(), windows(1)
    before = logits(model, data[0])
    names = pr.recovery.add_adapters_(
        model, pr.recovery.Adapters(rank=3, scale=0.5, only=("*down_proj", "*q_proj")), seed=1
    )
    assert len(names) == 10 and "model.layers.4.mlp.down_proj" in names
    assert torch.equal(logits(model, data[0]), before)
    layer = model.model.layers[2].mlp.down_proj
    assert isinstance(layer, LowRankAdapter) and layer.a.weight.shape == (3, 48) and layer.b.weight.shape == (32, 3)
    drawn = layer.a.weight.detach() * 48**0.5
    assert float(drawn.abs().max()) <= 1 and float(drawn.std()) == pytest.approx(3**-0.5, rel=0.2)
    with torch.no_grad():
        layer.b.weight.normal_()
    x = torch.randn(5, 48)
    wanted = x @ (layer.base.weight + 0.5 * layer.b.weight @ layer.a.weight).T
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    again = language_model()
    pr.recovery.add_adapters_(again, pr.recovery.Adapters(rank=3, only=("*down_proj", "*q_proj")), seed=1)
    assert again.model.layers[2].mlp.down_proj.a.weight.equal(layer.a.weight)


def test_tied_heads_get_none_and_a_pattern_without_a_layer_is_an_error() -> None:
    names = pr.recovery.add_adapters_(language_model(tie_word_embeddings=True))
    assert "lm_head" not in names and "lm_head" in pr.recovery.add_adapters_(language_model())
    with pytest.raises(RequestError, match="no layer gets an adapter"):
        pr.recovery.add_adapters_(language_model(), pr.recovery.Adapters(only=("*nothing*",)))
    with pytest.raises(RequestError, match="rank=0"):
        pr.recovery.Adapters(rank=0)


@pytest.mark.parametrize("adapters", [pr.recovery.Adapters(rank=4), None], ids=["adapters", "all weights"])
def test_recovery_brings_the_model_nearer_to_the_dense_one(adapters: pr.recovery.Adapters | None) -> None:
    model, data = language_model(), windows(4)
    small = pr.shrink(model, pr.llm.drop_run(model, data[0], data, count=2))
    keys, dense = list(small.state_dict()), {n: v.clone() for n, v in model.state_dict().items()}
    small.model.embed_tokens.weight.requires_grad_(False)
    before = pr.metrics.token_agreement(model, small, data).kl
    done = pr.recovery.distill_lm_(small, model, data, steps=30, lr=1e-2 if adapters else 1e-3, adapters=adapters)
    assert pr.metrics.token_agreement(model, small, data).kl < 0.9 * before
    assert len(done.curve.loss) == 30 and done.curve.loss[-1] < done.curve.loss[0]
    assert list(small.state_dict()) == keys and len(done.merged) == (3 * 7 + 1 if adapters else 0)
    assert not small.model.embed_tokens.weight.requires_grad and small.lm_head.weight.requires_grad
    assert all(value.equal(dense[name]) for name, value in model.state_dict().items())
    generates_as_without_a_cache(small)
    assert ("22 adapters, merged" if adapters else "all weights") in str(done)


def test_the_first_loss_is_the_divergence_from_the_teacher() -> None:
    model, data = language_model(), windows(1)
    small = pr.shrink(model, pr.llm.drop_run(model, data[0], data, count=2))
    done = pr.recovery.distill_lm_(small, model, data, steps=1, lr=1e-3)
    fresh = pr.shrink(model, pr.llm.drop_run(model, data[0], data, count=2))
    assert done.curve.loss[0] == pytest.approx(pr.metrics.token_agreement(model, fresh, data).kl, rel=1e-4)


@pytest.mark.parametrize("recorded", [True, False])
def test_zeros_stay_zero_recorded_or_not(recorded: bool) -> None:
    model, data = language_model(), windows(2)
    small = language_model()
    zeros = pr.plan(small, data[0], pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.5))
    pr.apply_(small, zeros)
    if not recorded:
        pr.finalize(small)
    done = pr.recovery.distill_lm_(small, model, data, steps=5, lr=1e-2)
    assert done.merged and all(one.lost == 0 for one in done.merged)  # what trained is what was merged
    for name, mask in zeros.masks.items():
        weight = small.get_parameter(name).detach()
        assert float(weight[~mask].abs().max()) == 0 and bool((weight != 0)[mask].all())


def test_a_stray_zero_costs_no_masked_product_and_stays() -> None:
    model, small, data = language_model(), language_model(), windows(2)
    with torch.no_grad():
        small.model.layers[0].mlp.down_proj.weight[0, 0] = 0
        small.model.layers[1].mlp.down_proj.weight[:, :20] *= 0.1
    done = pr.recovery.distill_lm_(small, model, data, steps=5, lr=1e-2)
    weight = small.model.layers[0].mlp.down_proj.weight.detach()
    assert float(weight[0, 0]) == 0 and int((weight == 0).sum()) == 1 and sum(m.lost > 0 for m in done.merged) == 1


def test_a_loss_that_breaks_leaves_plain_layers_behind() -> None:
    model, data = language_model(), windows(1)
    small = language_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="loss became nan"):
        pr.recovery.distill_lm_(small, model, data, steps=2, lr=1e-3)
    assert not any(isinstance(module, LowRankAdapter) for module in small.modules())
    assert all(p.requires_grad for p in small.parameters())
    assert isinstance(small.model.layers[0].mlp.down_proj, nn.Linear)
