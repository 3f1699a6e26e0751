"""Experts of a mixture are solved one by one, each for the tokens that are routed to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.llm import experts
from prunella.model.masks import masks_of
from prunella.model.observed_reads import Read
from prunella.model.watch import Watch

PATTERN = pr.NM(2, 4)
HOW = pr.llm.OneShot(PATTERN, method=pr.solvers.sparsegpt)


class Mixture(nn.Module):
    """Two stacked layers of four experts, of which every token takes one; a plain layer before them.

    access: how the experts are run. mute: an expert that is never chosen.
    """

    def __init__(self, access: str = "slices", *, mute: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.router = nn.Linear(8, 12), nn.Linear(12, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 12)), nn.Parameter(torch.randn(4, 8, 16))
        self.access, self.mute = access, mute

    def chosen(self, x: Tensor) -> Tensor:
        """The expert of each token."""
        scores = self.router(x)
        if self.mute is not None:
            scores = scores.index_fill(1, torch.tensor([self.mute]), -1e9)
        return scores.argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        own = torch.nn.functional.one_hot(self.chosen(x), 4).T.to(x)
        y = x.new_zeros(len(x), 8)
        for expert in range(4):
            tokens = own[expert].nonzero()[:, 0]
            if len(tokens):
                index = torch.tensor(expert) if self.access == "tensors" else expert
                hidden = torch.relu(torch.nn.functional.linear(x[tokens], self.up[index]))
                y[tokens] = torch.nn.functional.linear(hidden, self.down[index])
        return y


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 8, generator=generator) for _ in range(count)]


def by_hand(model: Mixture, out: list[Tensor]) -> dict[str, Tensor]:
    """Each expert solved alone, in float64 sums, from the tokens that choose it."""
    with torch.no_grad():
        x = torch.cat([model.before(b) for b in out])
        whose = model.chosen(x)
        up, down = model.up.detach().clone(), model.down.detach().clone()
        for expert in range(4):
            some = x[whose == expert]
            up[expert] = pr.solvers.sparsegpt(
                up[expert], some.T @ some if len(some) else torch.eye(12), PATTERN, sparsity=0.5
            ).weight
            hidden = torch.relu(some @ up[expert].T)
            gram = hidden.T @ hidden if len(some) else torch.eye(16)
            down[expert] = pr.solvers.sparsegpt(down[expert], gram, PATTERN, sparsity=0.5).weight
    return {"up": up, "down": down}


@pytest.mark.parametrize("access", ["slices", "tensors"])
@pytest.mark.parametrize("mute", [None, 2])
def test_each_expert_is_solved_from_its_own_tokens(access: str, mute: int | None) -> None:
    model = Mixture(access, mute=mute)
    expected = by_hand(model, batches())
    done = pr.llm.solve_(model, batches()[0], HOW, data=batches(), skip=["before", "router"])
    for name, weight in expected.items():
        torch.testing.assert_close(getattr(model, name).detach(), weight, rtol=1e-4, atol=1e-5)
        assert bool(getattr(model, name).view(-1, 4).eq(0).sum(1).eq(2).all())
    assert {fit.name: fit.tokens for fit in done.fits} == {"up": 120, "down": 120} and done.sparsity == 0.5
    assert {mask.shape for mask in masks_of(model).values()} == {model.up.shape, model.down.shape}


def test_an_expert_without_tokens_is_pruned_by_magnitude() -> None:
    model = Mixture(mute=1)
    before = model.up[1].detach().clone()
    pr.llm.solve_(model, batches()[0], HOW, data=batches(), skip=["before", "router", "down"])
    kept = before.abs().view(-1, 4).topk(2, 1).indices
    expected = torch.zeros_like(before).view(-1, 4).scatter(1, kept, before.view(-1, 4).gather(1, kept)).view_as(before)
    assert torch.equal(model.up[1].detach(), expected)


class Batched(nn.Module):
    """Four matrices that all tokens meet, in one product, or one number after the other."""

    def __init__(self, *, product: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product = product
        self.before, self.experts = nn.Linear(8, 12), nn.Parameter(torch.randn(4, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x).expand(4, -1, -1)
        if self.product:
            return torch.bmm(hidden, self.experts).sum(0)
        return (hidden[..., None] * self.experts[:, None]).sum((0, 2))


def test_experts_that_run_in_one_product_are_solved_one_by_one() -> None:
    model = Batched(product=True)
    before = model.experts.detach().clone()
    with torch.no_grad():
        x = torch.cat([model.before(b) for b in batches()])
    done = pr.llm.solve_(model, batches()[0], HOW, data=batches(), skip=["before"])
    for matrix, old in zip(model.experts.detach(), before, strict=True):
        expected = pr.solvers.sparsegpt(old.T, x.T @ x, PATTERN, sparsity=0.5).weight
        torch.testing.assert_close(matrix.T, expected, rtol=1e-4, atol=1e-5)
    assert {fit.name: (fit.skipped, fit.tokens) for fit in done.fits} == {"experts": ("", 4 * 120)}


def test_experts_that_no_product_reads_are_named_as_kept_dense() -> None:
    model = Batched(product=False)
    before = model.experts.detach().clone()
    done = pr.llm.solve_(model, batches()[0], HOW, data=batches())
    assert {fit.name: fit.skipped for fit in done.fits if fit.skipped} == {
        "experts": "its matrices are read all at once"
    }
    assert torch.equal(model.experts.detach(), before)


def test_few_grams_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, turns = Mixture(), Mixture()
    pr.llm.solve_(whole, batches()[0], HOW, data=batches())
    monkeypatch.setattr(experts, "_MOST", 2 * 8 * 12 * 12)  # two experts of `up`, one of `down`
    pr.llm.solve_(turns, batches()[0], HOW, data=batches())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), turns.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "router"), [("Mixtral", "gate"), ("GptOss", "router")])
def test_mixtures_of_transformers_lose_experts_weights_and_keep_their_routers(kind: str, router: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    access = model.config._experts_implementation
    data = [{"input_ids": torch.randint(0, 64, (1, 32))} for _ in range(3)]
    done = pr.llm.solve_(model, data[0], pr.llm.OneShot(PATTERN, refine=pr.llm.Refine(1)), data=data)
    whole = {fit.name: fit.skipped for fit in done.fits if fit.skipped}
    assert whole.pop("lm_head") == "it is outside the blocks"
    assert whole == {f"model.layers.{k}.mlp.{router}": "it chooses experts" for k in range(2)}
    assert sum(".experts." in fit.name and fit.tokens == 3 * 32 * 2 for fit in done.fits) == 4
    assert model.config._experts_implementation == access
    for name, mask in masks_of(model).items():
        assert not bool(model.get_parameter(name)[~mask].any()) and float(mask.float().mean()) == 0.5


def test_a_watch_for_plain_layers_sees_no_stacks() -> None:
    model, seen = Mixture(), list[Read]()
    with torch.no_grad():
        with Watch([model.up, model.before.weight], seen.append) as watch:
            model(batches()[0])
        watch.finish()
        assert [read.weight is model.before.weight and read.part is None for read in seen] == [True]
        parts = list[Read]()
        with Watch([model.up], parts.append, stacks=True) as watch:
            model(batches()[0])
        watch.finish()
    assert all(read.weight is model.up and tuple(read.y.shape) == (len(read.x), 16) for read in parts)
    assert sum(len(read.x) for read in parts) == 40 and len({read.part for read in parts}) == len(parts)
