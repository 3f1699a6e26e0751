"""What a cut removes: slices, sizes and attributes that go together, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.graph.traps.nets import SHAPE, half
from tests.oracle import (
    check_exact,
    cut,
    masked,
    produced_by,
    run,
    settle,
)
from tests.zoo import convolutional as conv
from tests.zoo import odd
from torch import Tensor, nn

from prunella.graph.cut.changes import attributes, cuts
from prunella.graph.solve.groups import couple


class ThreeChunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(6, 36), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.last(torch.sigmoid(q) * k + v)


def test_chunk_of_three_at_half_removes_half() -> None:
    model = settle(ThreeChunks())
    x = torch.randn(3, 6)
    graph = couple(model, x)
    group = produced_by(graph, "qkv")
    assert group.size == 12
    small = cut(model, graph, half(graph))
    assert small.qkv.weight.shape == (18, 6) and small.last.weight.shape == (4, 6)
    torch.testing.assert_close(run(small, x), run(masked(model, graph, half(graph)), x))
    member = next(m for m in group.members if m.entity == "qkv.weight")
    assert sorted(member.index[member.unit == 5].tolist()) == [5, 17, 29]


def test_a_filter_is_gone_with_its_bias_and_its_norm() -> None:
    checked = check_exact(conv.VGG(), torch.randn(SHAPE))
    left = int(checked.keep[produced_by(checked.graph, "conv1").name].sum())
    small: Any = checked.small
    sizes = {small.conv1.weight.shape[0], small.conv1.bias.shape[0], small.bn1.weight.shape[0], small.bn1.bias.shape[0]}
    sizes |= {small.bn1.running_mean.shape[0], small.bn1.running_var.shape[0], small.conv2.weight.shape[1]}
    assert sizes == {left} and left < 8


def test_nothing_to_remove_changes_nothing() -> None:
    model = settle(conv.ResNet())
    graph = couple(model, torch.randn(SHAPE))
    whole = {g.name: torch.ones(g.size, dtype=torch.bool) for g in graph.groups}
    assert cuts(graph, {}) == {} and cuts(graph, whole) == {} and attributes(graph, whole) == {}
    assert graph.macs(whole) == graph.macs() and graph.params(whole) == graph.params()


def test_tied_parameters_are_counted_and_cut_once() -> None:
    checked = check_exact(odd.TiedLanguageModel(), torch.arange(10).view(2, 5), modes=("all",))
    graph, keep = checked.graph, checked.keep
    stream, inner = (int(keep[produced_by(graph, name).name].sum()) for name in ("down", "up"))
    assert graph.params() == 20 * 12 + 12 * 24 + 24 + 24 * 12 + 12
    assert graph.params(keep) == 20 * stream + stream * inner + inner + inner * stream + stream
    assert "head.weight" not in graph.entities


def test_every_size_attribute_follows() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 4, 1)
    )
    checked = check_exact(model, torch.randn(SHAPE), fraction=0.5)
    small: Any = checked.small
    assert (small[1].num_groups, small[1].num_channels) == (2, 6)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (6, 6, 6)
    assert (small[0].out_channels, small[3].in_channels) == (6, 6)
    assert repr(small[1]).startswith("GroupNorm(2, 6,")


def test_heads_are_attributes_that_follow() -> None:
    checked = check_exact(odd.AttentionBlock(heads=4, kv_heads=2), torch.randn(2, 5, 16), fraction=0.5)
    before: Any = checked.dense.attention
    after: Any = checked.small.attention
    assert (after.heads, after.kv_heads, after.repeats, after.head_dim) == (2, 1, 2, before.head_dim)


class ScaleInForward(odd.Attention):
    """The scale is computed from the size of a head each time."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


def test_the_scale_of_attention_stays() -> None:
    checked = check_exact(ScaleInForward(16, 4, 4), torch.randn(2, 5, 16), fraction=0.5)
    heads = produced_by(checked.graph, "query")
    assert (heads.size, heads.kind) == (4, "head")
    rows = next(m for m in heads.members if m.entity == "query.weight")
    assert sorted(rows.index[rows.unit == 1].tolist()) == [4, 5, 6, 7], "a head goes whole: its size and scale stay"


class Rotary(odd.Attention):
    """Queries and keys are turned in pairs (i, i + half) of each head."""

    def __init__(self) -> None:
        super().__init__(16, 4, 4)
        angle = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def turn(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_rotary_embeddings_keep_the_size_of_a_head() -> None:
    checked = check_exact(Rotary(), torch.randn(2, 5, 16), fraction=0.5)
    heads = produced_by(checked.graph, "query")
    assert (heads.size, heads.kind) == (4, "head")
    small: Any = checked.small
    assert (small.heads, small.head_dim, small.cos.shape[-1]) == (2, 4, 4)


class Config:
    """Sizes that several layers share."""

    def __init__(self) -> None:
        self.heads, self.width, self.hidden = 4, 16, 24


class Configured(nn.Module):
    """Two blocks that read the number of heads and of neurons from one configuration each time they run."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            q, k, v = qkv(x).view(batch, time, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + down(F.relu(up(x).view(batch, time, self.config.hidden)))
        return x


def test_a_shared_configuration_is_not_told_two_numbers() -> None:
    checked = check_exact(Configured(), torch.randn(2, 5, 16), fraction=0.5)
    small: Any = checked.small
    assert type(small.config.heads) is int and small.config.hidden in (12, 24)
    assert (checked.dense.config.heads, checked.dense.config.hidden) == (4, 24)
