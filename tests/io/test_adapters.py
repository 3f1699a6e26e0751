"""Low-rank adapters are cut with the weights they adapt: merged before the cut or after it, the model is the same."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella
from prunella.errors import NotSupported
from prunella.graph.cut.surgery import cut_
from prunella.graph.match import rank_of
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.targets import Params
from tests.oracle import check_exact, distance, produced_by, run, settle

BOTH = prunella.Recipe(granularity=(prunella.Channel(), prunella.Head()))
X = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(3))


class Adapted(nn.Module):
    """A frozen linear layer with `scaling * B A` beside it, as adapters of this kind are written everywhere."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), 2.0
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling
        return out

    def merged(self) -> nn.Linear:
        """One layer that computes the same."""
        made = copy.deepcopy(self.base)
        with torch.no_grad():
            made.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
        return made


class Block(nn.Module):
    """Attention with four heads and a gated MLP; queries, values and two layers of the MLP may be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return out


ADAPTED = ("q", "v", "gate", "down")


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = Block().requires_grad_(False)
    for name in ADAPTED:
        setattr(model, name, Adapted(getattr(model, name), 3))
    return settle(model)


def merge(model: nn.Module) -> nn.Module:
    """A copy with every adapter merged into its weight."""
    made = copy.deepcopy(model)
    for name in ADAPTED:
        setattr(made, name, getattr(made, name).merged())
    return made


def test_adapters_follow_the_axes_of_what_they_adapt() -> None:
    graph = check_exact(adapted(), X).graph
    heads, neurons = produced_by(graph, "q.base"), produced_by(graph, "gate.base")
    assert {(m.entity, m.axis, len(m.index)) for m in heads.members if "lora" in m.entity} == {
        ("q.lora_B.weight", 0, 16),
        ("v.lora_B.weight", 0, 16),
    }
    assert {(m.entity, m.axis, m.role) for m in neurons.members if "lora" in m.entity} == {
        ("gate.lora_B.weight", 0, "out"),
        ("down.lora_A.weight", 1, "in"),
    }
    assert (heads.size, neurons.size) == (4, 20)


def test_merging_and_cutting_go_in_any_order() -> None:
    model = adapted().double()
    plan = prunella.plan(model, X.double(), BOTH, target=Params(0.6))
    small = prunella.shrink(model, plan)
    assert verify(model, small, plan.changes, X).error <= 1e-9
    first, last = merge(model), merge(small)
    for name in ADAPTED:
        wanted = first.get_parameter(f"{name}.weight")
        for axis, kept in plan.cuts[f"{name}.base.weight"].items():
            wanted = wanted.index_select(axis, kept)
        assert float((wanted - last.get_parameter(f"{name}.weight")).abs().max()) <= 1e-12
    names = {f"{name}.base.weight": f"{name}.weight" for name in ADAPTED}
    names |= {f"{name}.base.bias": f"{name}.bias" for name in ADAPTED}
    by_hand = copy.deepcopy(first)
    cuts = {names.get(name, name): axes for name, axes in plan.cuts.items() if "lora" not in name}
    cut_(by_hand, cuts, plan.attributes)
    assert distance(run(last, X.double()), run(by_hand, X.double())) <= 1e-12
    assert distance(run(last, X.double()), run(small, X.double())) <= 1e-12


def test_the_rank_is_cut_only_by_name() -> None:
    model = adapted()
    plan = prunella.plan(model, X, target=Params(0.8))
    assert not [name for name in plan.keep if "lora" in name]
    ranks = [f for f in plan.frozen if "rank of an adapter" in f.reason]
    assert sorted(f.entity for f in ranks) == sorted(f"{name}.lora_A.weight" for name in ADAPTED)
    small = prunella.shrink(model, plan)
    assert all(small.get_parameter(f"{name}.lora_A.weight").shape[0] == 3 for name in ADAPTED)
    named = prunella.plan(model, X, target=prunella.Sparsity(0.3), only=["*lora_A*"])
    assert {name: int(keep.sum()) for name, keep in named.keep.items()} == {f"{n}.lora_A": 2 for n in ADAPTED}
    prunella.shrink(model, named)


def test_what_is_all_trained_or_all_frozen_is_no_adapter() -> None:
    trained = adapted().requires_grad_(True)
    graph = couple(trained, X)
    assert not [g.name for g in graph.groups if rank_of(graph, g)]
    graph = couple(adapted().requires_grad_(False), X)
    assert not [g.name for g in graph.groups if rank_of(graph, g)]
    bottleneck = nn.Sequential(nn.Linear(12, 3, bias=False), nn.Linear(3, 12, bias=False), nn.Linear(12, 7))
    bottleneck[2].requires_grad_(False)
    graph = couple(settle(bottleneck), X)
    assert [g.size for g in graph.groups] == [3, 12] and not [g.name for g in graph.groups if rank_of(graph, g)]


def test_nothing_but_ranks_is_told() -> None:
    model = nn.Sequential(Adapted(nn.Linear(12, 6), 3))
    with pytest.raises(NotSupported, match="rank of an adapter"):
        prunella.plan(settle(model), X, target=Params(0.5))


def test_training_goes_on_after_the_cut() -> None:
    model = adapted()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(flags.values())) == 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(X).square().mean().backward()
    optimizer.step()
    plan = prunella.plan(model, X, BOTH, target=Params(0.6))
    small = prunella.shrink(model, plan)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == flags
    prunella.transform.carry_(optimizer, model, small, plan)
    base = small.get_parameter("gate.base.weight").detach().clone()
    loss = small(X).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert small(X).square().mean() < loss
    assert torch.equal(base, small.get_parameter("gate.base.weight"))
    assert all((p.grad is not None) == flags[name] for name, p in small.named_parameters())


def peft_model() -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        from tests.zoo.test_transformers import FAMILIES, inputs_of

        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets)
        return settle(peft.get_peft_model(FAMILIES["llama"].build(), config)), inputs_of(FAMILIES["llama"])


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft() -> None:
    model, inputs = peft_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would prove nothing
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
    model = model.double()
    plan = prunella.plan(model, inputs, BOTH, target=Params(0.7))
    small: Any = prunella.shrink(model, plan)
    assert verify(model, small, plan.changes, inputs).error <= 1e-9
    assert not [name for name in plan.keep if "lora" in name]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == flags
    before = run(small, inputs)
    dense: Any = copy.deepcopy(model)
    first, last = dense.merge_and_unload(), copy.deepcopy(small).merge_and_unload()
    assert distance(run(last, inputs), before) <= 1e-10
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): axes
        for name, axes in plan.cuts.items()
        if "lora" not in name
    }
    for name, weight in first.named_parameters():
        for axis, positions in kept.get(name, {}).items():
            weight = weight.index_select(axis, positions)
        assert math.isclose(float((weight - last.get_parameter(name)).abs().max()), 0, abs_tol=1e-12), name
    loss = run_loss(small, inputs)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in small.parameters())


def run_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
    return loss
