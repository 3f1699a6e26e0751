"""A rotated model is equivalent, and slicing directions without energy changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported

transformers = pytest.importorskip("transformers")


def llama(*, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
            elif "embed" in name:
                parameter.mul_(20)
    return model  # type: ignore[no-any-return]


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (4, 12), generator=generator)} for _ in range(3)]


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
def test_with_nothing_sliced_the_logits_stay(tied: bool) -> None:
    model = llama(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    turned = pr.llm.rotate(model, data()[0], data())
    assert float((logits(turned.model, data()[1]) - logits(model, data()[1])).abs().max()) < 1e-4
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not turned.model.lm_head.weight.equal(turned.model.model.embed_tokens.weight)
    assert turned.model.config.tie_word_embeddings is False and model.config.tie_word_embeddings is tied
    assert (
        all(bool((turned.model.get_parameter(name) == 1).all()) for name in turned.scales) and len(turned.scales) == 7
    )


def test_energy_is_that_of_what_layers_read_and_falls() -> None:
    turned = pr.llm.rotate(llama(), data()[0], data())
    assert float(turned.energy.sum()) == pytest.approx(32, rel=1e-6)
    assert bool((turned.energy.diff() <= 1e-9).all())
    seen: list[Tensor] = []
    layer = turned.model.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 32)))
    logits(turned.model, data()[0])
    squares = seen[0].square().mean(0)
    assert float(squares[:8].sum()) > 2 * float(squares[-8:].sum())
    assert "95 %" in str(turned)


def test_slicing_directions_that_carry_nothing_changes_nothing() -> None:
    model = llama()
    with torch.no_grad():  # the stream lives in 20 of its 32 directions, none of them an axis
        basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q[:, :20].float()
        flat = basis @ basis.T
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.copy_(parameter @ flat)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(flat @ parameter)
            elif parameter.dim() == 1:
                parameter.fill_(0.7)  # a scale of its own for each position would leave the subspace
    turned = pr.llm.rotate(model, data()[0], data())
    assert float(turned.energy[20:].sum()) < 1e-5
    keep = torch.zeros(32, dtype=torch.bool)
    keep[:20] = True
    plan = pr.plan(turned.model, data()[0], pr.Recipe(pr.criteria.group_norm, pr.Width()), target=pr.Sparsity(12 / 32))
    assert torch.equal(plan.keep[turned.group], keep)
    small = pr.shrink(turned.model, plan)
    assert small.get_parameter("model.embed_tokens.weight").shape == (64, 20)
    pr.llm.rescale_(small, turned)
    gap = (logits(small, data()[1]) - logits(model, data()[1])).abs().max()
    assert float(gap) < 1e-3 * float(logits(model, data()[1]).abs().max())


def test_a_layer_norm_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    with pytest.raises(NotSupported, match="layer norm"):
        pr.llm.rotate(transformers.GPT2LMHeadModel(config).eval(), data()[0], data())
