"""Widths of streams and embeddings, experts and tokens: references written out here, without the engine's oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from tests.oracle import settle

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 7, 1, 12, 40, 9], [5, 2, 8, 33, 21, 4]])


class Norm(nn.Module):
    """A layer norm written out, in the manner of many sources."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(dim) + 0.5), nn.Parameter(torch.rand(dim) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class Stream(nn.Module):
    """A residual stream of 12 with two blocks; each norm is of the kind that is given."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.norms = nn.ModuleList([norm(12) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(12, 20) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(20, 12) for _ in range(2)])
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        out: Tensor = self.head(self.norms[2](x))
        return out


def gone_of(plan: pr.Plan, group: str) -> Tensor:
    return (~plan.keep[group]).nonzero().flatten()


def zeroed(model: nn.Module, graph: Any, plan: pr.Plan) -> nn.Module:
    """Every position of every removed unit at zero, by the graph's members."""
    replica = copy.deepcopy(model).double()
    tensors = dict([*replica.named_parameters(), *replica.named_buffers()])
    with torch.no_grad():
        for group in graph.groups:
            if group.name in plan.keep:
                lost = ~plan.keep[group.name].numpy()
                for member in group.members:
                    index = torch.from_numpy(member.index[lost[member.unit]])
                    tensors[member.entity].index_fill_(member.axis, index, 0)
    return replica


def restricted(kept: Tensor, *, layer: bool, eps: float) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A norm whose statistics are those of the kept positions."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inner = x[..., kept]
        if layer:
            inner = inner - inner.mean(-1, keepdim=True)
        inner = inner / (inner.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight[kept]
        found = torch.zeros_like(x)
        found[..., kept] = inner if bias is None else inner + bias[kept]
        return found

    return norm


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, Norm])
def test_a_stream_loses_width_with_norms_of_what_stays(kind: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model = settle(Stream(kind))
    graph = couple(model, IDS)
    (width,) = [group for group in graph.groups if group.kind == "width"]
    assert width.size == 12 and width.why and "test_widths.py:" in width.where
    plan = pr.plan(model, IDS, pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.5))
    small = pr.shrink(model, plan)
    kept = plan.keep[width.name].nonzero().flatten()
    assert len(kept) == 6 and small.head.weight.shape == (5, 6) and small.embed.weight.shape == (50, 6)
    assert torch.equal(small.up[1].weight, model.up[1].weight[:, kept])
    assert torch.equal(small.norms[0].weight, model.norms[0].weight[kept])
    dense = zeroed(model, graph, plan)
    norm = restricted(
        kept, layer=kind is not nn.RMSNorm, eps=torch.finfo(torch.float64).eps if kind is nn.RMSNorm else 1e-5
    )
    for module in dense.norms:
        module.forward = lambda x, m=module: norm(x, m.weight, getattr(m, "bias", None))
    torch.testing.assert_close(small.double()(IDS), dense(IDS), rtol=1e-9, atol=1e-9)


def llama(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 7, "eos_token_id": 12}
    config = transformers.LlamaConfig(**{**sizes, **heads, "bos_token_id": 1, **changes})
    return settle(transformers.LlamaForCausalLM(config))


def batch() -> dict[str, Any]:
    return {"input_ids": IDS, "use_cache": False}


def test_rms_norms_are_exact_up_to_a_known_factor() -> None:
    """With no epsilon, the smaller norm is the masked one times sqrt(kept / all)."""
    torch.manual_seed(0)
    model = llama(rms_norm_eps=0.0, pad_token_id=None)
    graph = couple(model, batch())
    plan = pr.plan(model, batch(), pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.25))
    assert plan.got == 0.25
    small, dense = pr.shrink(model, plan).double(), zeroed(model, graph, plan)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.mul_((12 / 16) ** 0.5)
    # the norm of this source works in float32
    torch.testing.assert_close(small(**batch()).logits, dense(**batch()).logits, rtol=1e-4, atol=1e-7)
    assert small.config.hidden_size in (12, 16) and small.model.embed_tokens.embedding_dim == 12


def test_a_narrower_stream_is_read_by_plain_from_pretrained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    plan = pr.plan(model, batch(), pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.25))
    small = pr.shrink(model, plan)
    pr.save(small, tmp_path / "small", plan=plan, dense=model)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert again.config.hidden_size == 12
    assert torch.equal(again(**batch()).logits, small(**batch()).logits)


def test_the_embedding_alone_can_be_narrower() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "embedding_size": 12, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
    model = settle(transformers.AlbertForSequenceClassification(config))
    inputs = {"input_ids": IDS}
    widths = [group for group in couple(model, inputs).groups if group.kind == "width"]
    assert sorted(group.size for group in widths) == [12, 16]
    name = next(group.name for group in widths if group.size == 12)
    plan = pr.plan(model, inputs, pr.Recipe(pr.magnitude, pr.Width()), target=pr.Sparsity(0.5), only=[name])
    small = pr.shrink(model, plan)
    assert small.albert.embeddings.word_embeddings.weight.shape == (50, 6)
    assert small.albert.encoder.embedding_hidden_mapping_in.weight.shape == (16, 6)


class Shaped(nn.Module):
    """A norm that keeps its size as a tuple of its own, or has it typed into the source."""

    def __init__(self, dim: int, typed: bool) -> None:
        super().__init__()
        self.weight, self.size, self.typed = nn.Parameter(torch.rand(dim) + 0.5), (dim,), typed

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (12,) if self.typed else self.size, self.weight)


@pytest.mark.parametrize("typed", [False, True])
def test_the_size_that_a_norm_keeps_follows(typed: bool) -> None:
    torch.manual_seed(0)
    model = settle(Stream(lambda dim: Shaped(dim, typed)))
    graph = couple(model, IDS)
    assert [group.size for group in graph.groups if group.kind == "width"] == ([] if typed else [12])
    if typed:
        assert any("12 is typed into the source" in f.reason and "test_widths.py:" in f.where for f in graph.frozen)
        return
    plan = pr.plan(model, IDS, pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.25))
    assert [norm.size for norm in pr.shrink(model, plan).norms] == [(9,)] * 3


def test_a_norm_within_heads_makes_no_width() -> None:
    """Norms over the features of each head: the heads may go, their features are no units."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    model = settle(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    )
    widths = [group.name for group in couple(model, batch()).groups if group.kind == "width"]
    assert widths == ["model.embed_tokens"]


class PerHead(nn.Module):
    """Heads of five features, normalized and mixed within each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.q, self.norm = 3, nn.Linear(6, 15), nn.RMSNorm(5)
        self.mix, self.last = nn.Linear(5, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        split = self.q(x).view(len(x), self.heads, -1)
        return self.last(self.mix(self.norm(split)).flatten(1))


def test_features_of_heads_are_no_width_where_heads_go() -> None:
    groups = couple(settle(PerHead()), torch.randn(4, 6)).groups
    assert [(group.size, group.kind) for group in groups] == [(3, "channel")]


def test_a_stream_that_is_an_output_stays() -> None:
    model = llama().model
    assert not [group for group in couple(model, batch()).groups if group.kind == "width"]
    with pytest.raises(pr.PruningError, match=r"an output of the model|a mean is taken"):
        pr.plan(model, batch(), pr.Recipe(pr.criteria.random, pr.Width()), target=pr.Sparsity(0.5))


# -- experts -------------------------------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
    return settle(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)))


def test_experts_go_with_their_columns_of_the_router() -> None:
    torch.manual_seed(0)
    model = mixtral()
    groups = [group for group in couple(model, batch()).groups if group.kind == "expert"]
    assert [(group.size, group.min_units) for group in groups] == [(6, 2)] * 2
    plan = pr.plan(model, batch(), pr.Recipe(pr.magnitude, pr.Expert()), target=pr.Sparsity(0.5))
    small, dense = pr.shrink(model, plan), copy.deepcopy(model)
    for layer, (group, replica) in enumerate(zip(groups, dense.model.layers, strict=True)):
        pruned = gone_of(plan, group.name)
        experts = small.model.layers[layer].mlp.experts
        assert len(pruned) == 3 and experts.gate_up_proj.shape[0] == experts.num_experts == 3
        replica.mlp.gate.forward = _router_without(replica.mlp.gate, pruned)
    got, wanted = small(**batch()).logits, dense(**batch()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # torch has no such product in float64
    assert (wanted - model(**batch()).logits).abs().max() > 1e-6


@pytest.mark.parametrize("layer", [0, 1])
def test_experts_of_one_layer_go_alone(layer: int) -> None:
    model = mixtral()
    plan = pr.plan(
        model, batch(), pr.Recipe(granularity=pr.Expert()), remove={f"model.layers.{layer}.mlp.gate": [1, 4]}
    )
    kept = [block.mlp.experts.num_experts for block in pr.shrink(model, plan).model.layers]
    assert kept == ([4, 6] if layer == 0 else [6, 4])


def _router_without(gate: Any, pruned: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
        logits[:, pruned] = -torch.inf
        values, index = torch.topk(logits.softmax(-1), gate.top_k, dim=-1)
        return logits, values / values.sum(-1, keepdim=True), index

    return route


def test_as_many_experts_stay_as_a_token_is_sent_to() -> None:
    torch.manual_seed(0)
    with pytest.raises(pr.PruningError, match="4 of 12 are kept"):
        pr.plan(mixtral(), batch(), pr.Recipe(pr.criteria.random, pr.Expert()), target=pr.Sparsity(0.9))


def test_a_choice_that_sends_nothing_is_no_expert() -> None:
    """Attention over learned slots: a softmax along them, but no routing."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3))
    assert not couple(model, torch.randn(4, 6)).groups


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_stay_give_the_same_logits(tied: bool) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=tied, bos_token_id=44)
    plan = pr.plan(model, batch(), pr.Recipe(granularity=pr.granularity.Vocabulary((*IDS.flatten().tolist(), 30))))
    small = pr.shrink(model, plan)
    kept = torch.tensor(sorted({*IDS.flatten().tolist(), 30, 44}))
    assert plan.keep[next(iter(plan.keep))].nonzero().flatten().equal(kept)
    got = small(input_ids=plan.renumber(IDS), use_cache=False).logits
    torch.testing.assert_close(got, model(**batch()).logits[..., kept])
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.lm_head.out_features == small.model.embed_tokens.num_embeddings == len(kept)
    assert (kept[small.config.eos_token_id], kept[small.config.pad_token_id]) == (12, 7)
    assert kept[small.model.embed_tokens.padding_idx] == 7
    with pytest.raises(pr.PruningError, match="token 49 is pruned"):
        plan.renumber(torch.tensor([3, 49]))


class Pooled(nn.Module):
    """Classifies a text; there are as many classes as tokens by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(50, 12), nn.Linear(12, 20), nn.Linear(20, 50)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.up(self.embed(ids).mean(1)).relu())
        return out


def test_classes_of_a_text_are_no_vocabulary() -> None:
    graph = couple(Pooled().eval(), IDS)
    assert "vocabulary" not in {group.kind for group in graph.groups}
    assert {f.reason for f in graph.frozen if f.entity.startswith("head")} == {"it is an output of the model"}


def test_the_smaller_vocabulary_generates_the_same_text_and_is_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    free = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    plan = pr.plan(
        model, batch(), pr.Recipe(granularity=pr.granularity.Vocabulary((*IDS.flatten().tolist(), *free[0].tolist())))
    )
    small = pr.shrink(model, plan)
    assert small.generate(plan.renumber(IDS[:1]), max_new_tokens=6, do_sample=False).equal(plan.renumber(free))
    pr.save(small, tmp_path / "small", plan=plan, dense=model)
    pr.io.save_plan(plan, tmp_path / "plan")
    assert pr.io.load_plan(tmp_path / "plan").renumber(free).equal(plan.renumber(free))
    for again in (pr.load(tmp_path / "small"), transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")):
        assert again.config.eos_token_id == small.config.eos_token_id
        assert torch.equal(
            again.eval()(plan.small_inputs["input_ids"]).logits, small(plan.small_inputs["input_ids"]).logits
        )


@pytest.mark.parametrize("tokens", [(), (-1,), (3.0,)])
def test_a_set_of_tokens_holds_numbers(tokens: tuple[Any, ...]) -> None:
    with pytest.raises(pr.PruningError, match="takes ids of kept tokens"):
        pr.granularity.Vocabulary(tokens)


def test_requests_about_tokens_that_make_no_sense() -> None:
    with pytest.raises(pr.PruningError, match="no token 50"):
        pr.plan(llama(), batch(), pr.Recipe(granularity=pr.granularity.Vocabulary((50,))))
    with pytest.raises(pr.PruningError, match="leave target= out"):
        pr.plan(llama(), batch(), pr.Recipe(granularity=pr.granularity.Vocabulary((5,))), target=pr.Sparsity(0.5))


def test_tokens_that_were_asked_for_are_never_left_out_without_a_word() -> None:
    plain, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    recipe = pr.Recipe(granularity=(pr.Channel(), pr.granularity.Vocabulary((1,))))
    with pytest.raises(pr.PruningError, match="no tokens to remove"):
        pr.plan(plain, x, recipe, target=pr.Params(0.5))
    with pytest.raises(pr.PruningError, match="leaves it out"):
        pr.plan(llama(), batch(), recipe, target=pr.Params(0.5), skip=["lm_head"])


def test_tokens_alone_do_not_pass_for_a_target() -> None:
    recipe = pr.Recipe(granularity=(pr.Expert(), pr.granularity.Vocabulary(tuple(range(45)))))
    with pytest.raises(pr.PruningError, match="no units to prune"):
        pr.plan(llama(), batch(), recipe, target=pr.Params(0.5))


# -- together ------------------------------------------------------------------------------------------------------


def test_all_kinds_of_units_share_one_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mixtral()
    granularities = (pr.Channel(), pr.Head(), pr.Width(), pr.Expert(), pr.granularity.Vocabulary(tuple(range(45))))
    recipe = pr.Recipe(pr.magnitude, granularities, pr.global_)
    plan = pr.plan(model, batch(), recipe, target=pr.Params(0.5))
    assert {row.kind for row in plan.rows} == {"channel", "head", "width", "expert", "vocabulary"}
    small = pr.shrink(model, plan)
    got = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.4 < got <= 0.5 and got == pytest.approx(plan.got)
    pr.io.save_plan(plan, tmp_path / "plan")
    again = pr.shrink(model, pr.io.load_plan(tmp_path / "plan"))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    pr.save(small, tmp_path / "small", plan=plan, dense=model)
    loaded = pr.load(tmp_path / "small")
    assert torch.equal(loaded(**plan.small_inputs).logits, small(**plan.small_inputs).logits)


def test_blocks_join_in() -> None:
    torch.manual_seed(0)
    model = mixtral()
    granularities = (
        pr.Channel(),
        pr.Head(),
        pr.Width(),
        pr.Expert(),
        pr.Depth(),
        pr.granularity.Vocabulary(tuple(range(45))),
    )
    plan = pr.plan(
        model, batch(), pr.Recipe(pr.criteria.random, granularities, pr.global_, seed=2), target=pr.Params(0.4)
    )
    assert {row.kind for row in plan.rows} == {"channel", "head", "width", "expert", "block", "vocabulary"}
    small = pr.shrink(model, plan)  # compared in float64 where the kernels have it
    assert plan.dropped and len(small.model.layers) == 1
    got = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert got <= 0.4 and got == pytest.approx(plan.got)
