"""Criteria for experts, against routers and experts that are read directly here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.planning.scoring import Scorer
from prunella.stats import Source, Subject, collect


class Mixture(nn.Module):
    """Four stacked experts of 6 -> 5 -> 6, two for each token; softmax before or after the choice."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 5, 6)), nn.Parameter(torch.randn(4, 6, 5))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            values, index = self.router(x).softmax(-1).topk(2, -1)
            return values / values.sum(-1, keepdim=True), index
        values, index = self.router(x).topk(2, -1)
        return values.softmax(-1), index

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        inner = torch.relu(torch.einsum("tkoi,ti->tko", self.up[index], x))
        out: Tensor = torch.einsum("tkio,tko,tk->ti", self.down[index], inner, weights)
        return out


class Net(nn.Module):
    def __init__(self, *, first: bool = True) -> None:
        super().__init__()
        self.mix, self.head = Mixture(first=first), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.mix(x))
        return out


def net(*, first: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(first=first).eval()


def batches() -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(n, 6, generator=rng) for n in (7, 12)]


def scored(model: nn.Module, criterion: Any, inputs: Any, data: list[Any]) -> list[Tensor]:
    graph = couple(model, inputs)
    groups = tuple(group for group in graph.groups if group.kind == "expert")
    subject = Subject(model, graph, groups=groups)
    with untouched(model, 0):
        found = collect(subject, ["expert_share", "expert_gate", "expert_output"], Source(data))
    score = Scorer(criterion, subject, found)
    return [score.units(group, pr.granularity.Reduce.SUM) for group in groups]


def by_hand(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums of weights, and sums of the norms of what experts add, one token and expert at a time."""
    weights, index = mixture.route(x)
    sums = torch.zeros(3, 4, dtype=torch.float64)
    for token, gates, experts in zip(x, weights, index.tolist(), strict=True):
        for gate, expert in zip(gates, experts, strict=True):
            out = mixture.down[expert] @ torch.relu(mixture.up[expert] @ token)
            sums[:, expert] += torch.stack([torch.ones(()), gate, (gate * out).norm()]).detach()
    return sums[0], sums[1], sums[2]


@pytest.mark.parametrize("first", [True, False])
def test_scores_are_those_of_each_token_and_expert_by_hand(first: bool) -> None:
    model = net(first=first)
    count, gates, added = by_hand(model.mix, torch.cat(batches()))
    assert len(count.unique()) > 1
    for criterion, wanted in ((pr.criteria.router_frequency, count / 19), (pr.criteria.router_weight, gates / count),
                              (pr.criteria.reap, added / count)):  # fmt: skip
        (found,) = scored(model, criterion, batches()[0], batches())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", [pr.criteria.router_frequency, pr.criteria.router_weight, pr.criteria.reap])
def test_a_score_is_the_same_each_time_and_the_model_too(criterion: Any) -> None:
    model, data = net(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (first,), (again,) = (scored(model, criterion, data[0], data) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float64 and first.shape == (4,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hooks = [*model.mix._forward_hooks.values(), *model._forward_pre_hooks.values()]
    assert not hooks


def test_an_expert_that_no_token_gets_goes_first_and_nothing_changes() -> None:
    model, data = net(), batches()
    with torch.no_grad():
        model.mix.router.bias[2] = -50.0
    dense = [model(x) for x in data]
    for criterion in (pr.criteria.router_frequency, pr.criteria.router_weight, pr.criteria.reap):
        plan = pr.plan(model, data[0], pr.Recipe(criterion, pr.Expert()), target=pr.Sparsity(0.25), data=data)
        (kept,) = plan.keep.values()
        assert kept.tolist() == [True, True, False, True]
        small = pr.shrink(model, plan)
        for x, wanted in zip(data, dense, strict=True):
            torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_router_is_renormalized_over_the_experts_that_stay() -> None:
    model, data = net(), batches()
    plan = pr.plan(model, data[0], pr.Recipe(pr.criteria.reap, pr.Expert()), target=pr.Sparsity(0.25), data=data)
    small = pr.shrink(model, plan)
    (kept,) = (mask.nonzero().flatten() for mask in plan.keep.values())
    weights, index = small.mix.route(data[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    logits = model.mix.router(data[0])[:, kept]
    best = logits.topk(2, -1)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))


def test_all_experts_kept_is_the_dense_model() -> None:
    model, data = net(), batches()
    plan = pr.plan(model, data[0], pr.Recipe(pr.criteria.reap, pr.Expert()), target=pr.Sparsity(0.0), data=data)
    assert all(bool(mask.all()) for mask in plan.keep.values())
    assert torch.equal(pr.shrink(model, plan)(data[0]), model(data[0]))


def test_without_a_router_the_criterion_says_so() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(pr.PruningError, match="no router chose"):
        pr.plan(plain, batches()[0], pr.Recipe(pr.criteria.reap), target=pr.Sparsity(0.5), data=batches())


def test_experts_of_a_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 9)), "use_cache": False}
    seen: list[tuple[Tensor, Any]] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    handles = [gate.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for gate in gates]
    model(**batch)
    for handle in handles:
        handle.remove()
    share, gate, output = (
        scored(model, c, batch, [batch])
        for c in (pr.criteria.router_frequency, pr.criteria.router_weight, pr.criteria.reap)
    )
    for number, (x, (_, weights, index)) in enumerate(seen):
        experts = model.model.layers[number].mlp.experts
        for expert in range(6):
            rows, slots = (index == expert).nonzero(as_tuple=True)
            assert share[number][expert].item() == pytest.approx(len(rows) / 27)
            both = x.reshape(-1, 16)[rows] @ experts.gate_up_proj[expert].T
            out = (torch.nn.functional.silu(both[:, :24]) * both[:, 24:]) @ experts.down_proj[expert].T
            added = (weights[rows, slots, None] * out).norm(dim=1)
            if len(rows):
                assert gate[number][expert].item() == pytest.approx(weights[rows, slots].mean().item(), rel=1e-5)
                assert output[number][expert].item() == pytest.approx(added.mean().item(), rel=1e-3)
    plan = pr.plan(model, batch, pr.Recipe(pr.criteria.reap, pr.Expert()), target=pr.Sparsity(0.5), data=[batch])
    assert all(int(mask.sum()) == 3 for mask in plan.keep.values()) and pr.shrink(model, plan)(**batch).logits.shape
