"""Heads of torch's attention modules and the stream that they read: cut exactly, counted, and the class stays."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.graph.rules.attention_nets import BATCH, FEATURES, TIME, Attending, HandWritten, Spec, specs
from tests.oracle import check_exact, frozen_because, settle
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.measure.count import measured_macs

X = torch.randn(BATCH, TIME, FEATURES, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
FAST = settings(
    max_examples=24, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def built(spec: Spec) -> Attending:
    torch.manual_seed(0)
    return Attending(spec)


def test_generated_attention_is_exact_and_whole_heads_can_go() -> None:
    seen: Counter[str] = Counter()

    @FAST
    @given(specs())
    def one(spec: Spec) -> None:
        model = built(spec)
        averaged = spec.reads == "output"
        checked = check_exact(model, X, count=False, modes=("all",))
        assert measured_macs(model, X) == checked.graph.macs() and not checked.graph.uncounted
        assert measured_macs(checked.small.float(), X) == checked.graph.macs(checked.keep)
        heads = [group for group in checked.graph.groups if group.size == spec.heads and group.kind == "head"]
        assert bool(heads) is not averaged, (spec, checked.graph.frozen)
        seen["all"] += 1
        seen["heads"] += bool(heads)
        for module in checked.small.modules():
            if isinstance(module, nn.MultiheadAttention):
                assert type(module) is nn.MultiheadAttention
                assert module.embed_dim == module.num_heads * module.head_dim == module.out_proj.in_features
                assert module.head_dim == spec.size
                packed = module.in_proj_weight
                assert module.kdim == (module.k_proj_weight if packed is None else packed).shape[1]

    one()
    assert seen["heads"] >= 0.5 * seen["all"] >= 12, seen


# -- the layers of nn.Transformer, whose norms take their statistics over the kept positions -------------------------


class Encoder(nn.Module):
    def __init__(self, *, norm_first: bool = False, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 24)
        layer = nn.TransformerEncoderLayer(24, heads, 20, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.encoder(self.enter(x)))
        return out


class Both(nn.Module):
    """An encoder and a decoder, as of DETR: queries attend to themselves and to a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.queries = nn.Linear(FEATURES, 24), nn.Embedding(4, 24)
        self.transformer = nn.Transformer(24, 4, 1, 1, 20, batch_first=True)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        targets = self.queries.weight[None].expand(len(x), -1, -1)
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        out: Tensor = self.out(self.transformer(self.enter(x), targets, tgt_mask=mask))
        return out


class Narrow(nn.Module):
    """A layer norm over some positions of its input, with zeros elsewhere."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.kept, self.eps = kept, norm.eps
        self.weight, self.bias = norm.weight[kept].detach(), norm.bias[kept].detach()

    def forward(self, x: Tensor) -> Tensor:
        inner = x[..., self.kept]
        inner = inner - inner.mean(-1, keepdim=True)
        inner = inner / (inner.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias
        return torch.zeros_like(x).index_copy(-1, self.kept, inner)


def reference(model: nn.Module, plan: pr.Plan, x: Tensor) -> Tensor:
    """The dense model in float64 with zeros at all that goes, and norms of the kept positions of the stream."""
    replica, graph = copy.deepcopy(model).double(), couple(model, x)
    parameters = dict(replica.named_parameters())
    stream = torch.ones(24, dtype=torch.bool)
    with torch.no_grad():
        for group in graph.groups:
            lost = ~plan.keep[group.name].numpy()
            for member in group.members:
                pruned = torch.from_numpy(member.index[lost[member.unit]])
                parameters[member.entity].index_fill_(member.axis, pruned, 0)
                if member.entity == "out.weight" and member.axis == 1:
                    stream[pruned] = False
    for path, module in list(replica.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent = replica.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], Narrow(module, stream.nonzero().flatten()))
    slow = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            found: Tensor = replica.eval()(x.double())
    finally:
        torch.backends.mha.set_fastpath_enabled(slow)
    return found


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("make", [Encoder, lambda **k: Encoder(norm_first=True, **k)])
def test_encoder_layers_lose_heads_with_their_stream(make: Any, heads: int) -> None:
    torch.manual_seed(0)
    check_width(settle(make(heads=heads)), heads)


def test_encoder_and_decoder_lose_heads_with_both_streams() -> None:
    torch.manual_seed(0)
    small = check_width(settle(Both()), 4)
    assert small.queries.embedding_dim == small.transformer.d_model == 12


def check_width(model: nn.Module, heads: int) -> Any:
    kinds = (pr.Channel(), pr.Width())
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, kinds, pr.uniform), target=pr.Params(0.45))
    (width,) = [group for group in couple(model, X).groups if group.kind == "width"]
    assert width.size == heads
    small = pr.shrink(model, plan)
    assert measured_macs(small, X) == plan.after.macs
    expected = reference(model, plan, X)
    with torch.no_grad():
        for fused in (True, False):  # the fused layers of torch too
            torch.backends.mha.set_fastpath_enabled(fused)
            found = small(X)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.backends.mha.set_fastpath_enabled(True)
    layers = [module for module in small.modules() if isinstance(module, nn.MultiheadAttention)]
    assert all(m.num_heads < heads and m.embed_dim == m.num_heads * m.head_dim for m in layers)
    small.train()(X).sum().backward()
    return small


def test_the_groups_do_not_depend_on_what_the_model_did_before() -> None:
    torch.manual_seed(0)
    model = Encoder()
    names = [(group.name, group.kind, group.size) for group in couple(model, X).groups]
    model(X).sum().backward()
    model.train()
    assert [(group.name, group.kind, group.size) for group in couple(model, X).groups] == names
    model.eval()
    with torch.no_grad():
        model(X)
    assert [(group.name, group.kind, group.size) for group in couple(model, X).groups] == names


# -- what stays, and why ----------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A stream that is the input, a single head, or a mask of each head."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.enter = nn.Identity() if what == "input" else nn.Linear(FEATURES, 6)
        self.attention = nn.MultiheadAttention(6, 1 if what == "head" else 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        mask = torch.zeros(2 * len(x), TIME, TIME) if self.what == "mask" else None
        found, weights = self.attention(h, h, h, attn_mask=mask)
        self.seen = weights if self.what == "kept" else None
        out: Tensor = self.out(found)
        return out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("input", "as its query has"),
        ("head", "root of its size"),
        ("mask", "a mask of its own"),
        ("kept", "a mean is taken over it"),
    ],
)
def test_heads_stay_with_a_true_reason(what: str, words: str) -> None:
    torch.manual_seed(0)
    graph = couple(Fixed(what), X)
    assert frozen_because(graph, "attention.in_proj_weight", 0, words, "as its query has"), graph.frozen


def test_in_a_program_the_heads_go_and_the_stream_stays() -> None:
    torch.manual_seed(0)
    model = settle(Encoder(layers=1))
    program = pr.as_program(model, X)
    assert any(group.kind == "head" and group.size == 4 for group in couple(program, X).groups)
    plan = pr.plan(program, X, pr.Recipe(pr.criteria.random, pr.Head(), pr.uniform), target=pr.Params(0.9))
    with torch.no_grad():
        assert pr.shrink(program, plan)(X).shape == model(X).shape


def test_a_size_computed_from_the_stream_lets_heads_go_with_it() -> None:
    torch.manual_seed(0)
    model = settle(nn.Sequential(nn.Linear(FEATURES, 24), HandWritten(24, 4), nn.Linear(24, 3)))
    checked = check_exact(model, X)
    assert [group.size for group in checked.graph.groups if group.kind == "head"] == [4] and checked.moved > 1e-9


def test_frozen_streams_name_the_program() -> None:
    torch.manual_seed(0)
    model = settle(Fixed("input"))
    with pytest.raises(pr.PruningError, match="program"):
        pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Head(), pr.uniform), target=pr.Params(0.9))
