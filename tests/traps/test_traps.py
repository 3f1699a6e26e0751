"""Traps that other toolkits fell into, and that the engine must not: one test each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import BadInput, PruningError
from prunella.graph.couple import attributes, couple, cuts
from prunella.graph.structure import Graph
from prunella.graph.surgery import cut_
from tests.oracle import (
    assert_untouched,
    check_exact,
    cut,
    frozen_because,
    macs,
    masked,
    produced_by,
    random_keep,
    run,
    settle,
    snapshot,
)
from tests.traps.nets import Flat, Image
from tests.zoo import convolutional as conv
from tests.zoo import odd

IMAGE = (2, 3, 8, 8)


def half(graph: Graph) -> dict[str, Tensor]:
    """Keep every second unit of each group."""
    return {g.name: torch.arange(g.size) % 2 == 0 for g in graph.groups}


def picture(graph: Graph) -> str:
    """A graph as text, arrays included, to compare two of them."""
    members = [(g.name, g.size, g.kind, m.entity, m.axis, m.role, m.index.tolist(), m.unit.tolist())
               for g in graph.groups for m in g.members]  # fmt: skip
    sizes = {name: [e.size(half(graph)) for e in extents] for name, extents in graph.extents.items()}
    return repr((members, graph.frozen, graph.layers, sizes, graph.macs(half(graph)), graph.uncounted, graph.unused))


# --- what a cut removes ------------------------------------------------------------------------------------------


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
    checked = check_exact(conv.VGG(), torch.randn(IMAGE))
    left = int(checked.keep[produced_by(checked.graph, "conv1").name].sum())
    small: Any = checked.small
    sizes = {small.conv1.weight.shape[0], small.conv1.bias.shape[0], small.bn1.weight.shape[0], small.bn1.bias.shape[0]}
    sizes |= {small.bn1.running_mean.shape[0], small.bn1.running_var.shape[0], small.conv2.weight.shape[1]}
    assert sizes == {left} and left < 8


def test_nothing_to_remove_changes_nothing() -> None:
    model = settle(conv.ResNet())
    graph = couple(model, torch.randn(IMAGE))
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
    checked = check_exact(model, torch.randn(IMAGE), fraction=0.5)
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


# --- what must stay, and why ---------------------------------------------------------------------------------------


class TypedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 3, 4)  # the sizes of this line are typed into the source
        return self.last(x.transpose(1, 2).reshape(-1, 12))


def test_a_typed_size_is_reported_with_file_and_line() -> None:
    lines, start = inspect.getsourcelines(TypedSize.forward)
    line = start + next(i for i, text in enumerate(lines) if "typed into the source" in text)
    graph = check_exact(TypedSize(), torch.randn(3, 6)).graph
    assert not graph.groups
    found = [f for f in graph.frozen if f.entity == "first.weight" and f.axis == 0]
    assert any(f.where.endswith(f"test_traps.py:{line}") and f.reason for f in found), found
    assert sum(f.count for f in found) == 12


class ChannelAttention(nn.Module):
    """ECA: a one-dimensional convolution slides over the means of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.eca, self.last = nn.Conv2d(3, 12, 1), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.last(x * torch.sigmoid(gate)[:, :, None, None])


class Fourier(nn.Module):
    """FNet: the transform mixes all positions of an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.fft(self.first(x), dim=-1).real)


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (ChannelAttention(), IMAGE, ("convolution", "slides")),
        (Fourier(), (3, 6), ("fft",)),
        (odd.NormedBlocks(), (3, 6), ("norm",)),
        (nn.Sequential(nn.Linear(6, 12), nn.Softmax(1), nn.Linear(12, 4)), (3, 6), ("softmax",)),
    ],
    ids=["eca", "fft", "layer norm", "softmax"],
)
def test_axes_that_are_mixed_stay_with_a_reason(model: nn.Module, shape: tuple[int, ...], words: tuple[str]) -> None:
    graph = check_exact(model, torch.randn(shape)).graph
    first = next(iter(graph.entities))
    assert frozen_because(graph, first, 0, *words), graph.frozen
    assert all(f.where for f in graph.frozen if f.entity == first and f.axis == 0)


class Blur(nn.Module):
    """Anti-aliased pooling: a constant filter per channel, kept as a buffer or expanded when it is needed."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.first, self.last, self.stored = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), stored
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(row, row) / 16
        self.register_buffer("kernel", kernel.expand(8, 1, 3, 3).clone() if stored else kernel.view(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kernel = self.kernel if self.stored else self.kernel.expand(x.shape[1], -1, -1, -1)
        return self.last(F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1]))


@pytest.mark.parametrize("stored", [True, False])
def test_constant_filters_are_cut_with_their_channels(stored: bool) -> None:
    checked = check_exact(Blur(stored), torch.randn(IMAGE))
    assert produced_by(checked.graph, "first").size == 8
    small: Any = checked.small
    assert small.kernel.shape[0] == (small.first.weight.shape[0] if stored else 1)


class Standardised(nn.Conv2d):
    """Each filter is brought to mean 0 and variance 1 before use, over all that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


def test_standardised_filters_go_whole_and_keep_their_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 10, 3), nn.Conv2d(10, 4, 1))
    graph = check_exact(model, torch.randn(IMAGE)).graph
    assert graph.group("1").size == 10
    assert frozen_because(graph, "0.weight", 0, "mean", "std", "var")


class ScaledStandardised(nn.Conv2d):
    """The same by a batch norm of the weight, as in networks without normalisers."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_batch_norm_of_a_weight_keeps_what_it_averages_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ScaledStandardised(8, 10, 3), nn.Conv2d(10, 4, 1))
    graph = check_exact(model, torch.randn(IMAGE)).graph
    assert frozen_because(graph, "0.weight", 0)
    assert not any(m.entity == "0.weight" for g in graph.groups for m in g.members)


class Cached(nn.Module):
    """Work that is done once: forward keeps a table of its own in a dictionary and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.bias = nn.Linear(6, 12), nn.Linear(12, 4), nn.Parameter(torch.randn(12))
        self.cache: dict[str, Tensor] = {}
        self.kept: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        if self.kept is None:
            self.kept = self.bias.detach().exp()
        self.calls += 1
        return self.last(x * self.kept + self.cache["bias"])


def test_what_a_run_leaves_in_the_model_is_taken_away() -> None:
    model = settle(Cached())
    before = snapshot(model)
    graph = couple(model, torch.ones(3, 6))
    assert model.cache == {} and model.kept is None and model.calls == 0 and type(model.calls) is int
    assert_untouched(before, snapshot(model))
    assert produced_by(graph, "first").size == 12
    torch.testing.assert_close(
        run(cut(model, graph, half(graph)), torch.ones(3, 6)), run(masked(model, graph, half(graph)), torch.ones(3, 6))
    )


def test_one_output_is_not_depthwise() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1))
    checked = check_exact(model, torch.randn(2, 1, 8, 8))
    assert {g.name: g.size for g in checked.graph.groups} == {"0": 8, "2": 6}
    assert all(layer.groups == 1 for layer in checked.graph.layers)
    members = {(m.entity, m.axis) for m in produced_by(checked.graph, "0").members}
    assert members == {("0.weight", 0), ("0.bias", 0), ("1.weight", 1)}


class Transposed(nn.Module):
    """transformers' Conv1D: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10))
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return self.last(F.gelu(y.view(*x.shape[:-1], self.bias.shape[0])))


def test_a_transposed_weight_is_a_linear_layer() -> None:
    graph = check_exact(Transposed(), torch.randn(2, 5, 6)).graph
    layer = next(x for x in graph.layers if x.entity == "weight")
    assert (layer.op, layer.out_axis, layer.in_axis, layer.bias) == ("linear", 1, 0, "bias")
    other = next(x for x in graph.layers if x.entity == "last.weight")
    assert (other.op, other.out_axis, other.in_axis, other.bias) == ("linear", 0, 1, "last.bias")
    assert produced_by(graph, "weight").size == 10


def test_detached_paths_and_buffers_carry_channels() -> None:
    graph = check_exact(odd.Detached(), torch.randn(3, 6)).graph
    readers = {m.entity for m in produced_by(graph, "first").members if m.role == "in"}
    assert readers == {"second.weight", "last.weight"}
    graph = check_exact(odd.ChannelBuffers(), torch.randn(IMAGE)).graph
    members = {(m.entity, m.axis) for m in produced_by(graph, "first").members}
    assert members >= {("mean", 0), ("mask", 1), ("scale", 0)}


# --- counting ------------------------------------------------------------------------------------------------------


CONVOLUTIONS = [
    (nn.Conv2d(1, 6, 5), (1, 1, 28, 28), 86_400),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), 2 * 5 * 5 * 6 * 4 * 9),
    (nn.Conv2d(4, 6, 3, dilation=2), (1, 4, 9, 9), 5 * 5 * 6 * 4 * 9),
    (nn.Conv2d(4, 8, 3, groups=2, padding=1), (1, 4, 6, 6), 6 * 6 * 8 * 2 * 9),
    (nn.Conv2d(4, 4, (3, 1), groups=4), (1, 4, 6, 6), 4 * 6 * 4 * 3),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 4),
    (nn.Conv1d(3, 5, 4, padding=2), (2, 3, 10), 2 * 11 * 3 * 5 * 4),
    (nn.Linear(6, 5), (2, 7, 6), 2 * 7 * 6 * 5),
]


@pytest.mark.parametrize(("layer", "shape", "wanted"), CONVOLUTIONS)
def test_multiply_adds_come_from_the_real_geometry(layer: nn.Module, shape: tuple[int, ...], wanted: int) -> None:
    model = nn.Sequential(layer)
    graph = couple(model.eval(), torch.randn(shape))
    assert graph.macs() == wanted == sum(x.macs for x in graph.layers)
    assert macs(model, torch.randn(shape)) == wanted


def test_multiply_adds_of_attention_are_counted() -> None:
    graph = check_exact(odd.AttentionBlock(), torch.randn(2, 5, 16)).graph
    products = sum(cost.macs({}) for cost in graph.costs if not cost.layer)
    assert products == 2 * (2 * 4 * 5 * 5 * 4)
    assert graph.macs() == products + 2 * 5 * (4 * 16 * 16 + 2 * 16 * 24 + 16 * 3)


class Uncounted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(self.first(x), dim=0).real
        return self.last(x) + torch.cdist(x, x)[:, :1]


def test_operations_that_are_not_counted_are_listed() -> None:
    graph = couple(Uncounted().eval(), torch.randn(3, 6))
    assert any("fft" in name for name in graph.uncounted) and any("cdist" in name for name in graph.uncounted)
    assert all(count == 1 for count in graph.uncounted.values())


# --- one run does not know of another --------------------------------------------------------------------------------


def test_a_second_run_knows_nothing_of_the_first() -> None:
    torch.manual_seed(0)
    model, other = settle(conv.ShuffleNet()), settle(odd.AttentionBlock(kv_heads=2))
    x, y = torch.randn(IMAGE), torch.randn(2, 5, 16)
    first = picture(couple(model, x))
    between = picture(couple(other, y))
    cut(model, couple(model, x), half(couple(model, x)))
    assert picture(couple(model, x)) == first and picture(couple(other, y)) == between
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    assert type(x.shape[0]) is int and type(other.attention.heads) is int


def test_a_cut_model_is_cut_again() -> None:
    checked = check_exact(conv.ResNet(option_a=True), torch.randn(IMAGE), fraction=0.3)
    again = check_exact(checked.small.float(), torch.randn(IMAGE), fraction=0.3, seed=1)
    assert again.graph.params(again.keep) < checked.graph.params(checked.keep) == again.graph.params()


def test_training_mode_statistics_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(4)
    before = snapshot(model)
    couple(model, torch.ones(IMAGE))
    assert_untouched(before, snapshot(model))
    assert torch.is_grad_enabled() and model[1].num_batches_tracked == 0


class Raises(odd.Attention):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("no such luck")


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model, x = Raises(16, 4, 4), torch.randn(2, 5, 16)
    before = snapshot(model)
    with pytest.raises(BadInput, match="no such luck"):
        couple(model, x)
    assert_untouched(before, snapshot(model))
    assert type(model.heads) is int and not nn.modules.module._global_forward_hooks
    assert type(torch.ones(3).shape[0]) is int


# --- sizes that happen to be equal, to be one, or to be zero ---------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8, 12])
def test_groups_do_not_depend_on_the_batch(batch: int) -> None:
    model = settle(conv.SqueezeExcite())
    usual = {g.name: g.size for g in couple(model, torch.randn(2, 3, 8, 8)).groups}
    assert {g.name: g.size for g in couple(model, torch.randn(batch, 3, 12, 12)).groups} == usual
    check_exact(model, torch.randn(batch, 3, 8, 8))


@pytest.mark.parametrize("time", [1, 4, 16])
def test_groups_do_not_depend_on_the_sequence(time: int) -> None:
    checked = check_exact(odd.AttentionBlock(kv_heads=2), torch.randn(4, time, 16))
    assert {g.size for g in checked.graph.groups} == {2, 24}


def test_an_empty_batch_or_map_couples_the_same_or_is_refused() -> None:
    model = settle(conv.GroupNormNet())
    usual = {g.name: g.size for g in couple(model, torch.randn(IMAGE)).groups}
    for shape in ((0, 3, 8, 8), (2, 3, 0, 0)):
        try:
            found = {g.name: g.size for g in couple(model, torch.zeros(shape)).groups}
        except PruningError as refusal:
            assert refusal.what and refusal.why
        else:
            assert found == usual


def test_maps_of_one_pixel_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = check_exact(model, torch.randn(2, 3, 4, 4)).graph
    assert (produced_by(graph, "0").size, produced_by(graph, "2").size) == (8, 6)


def test_groups_of_one_unit_are_never_emptied() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 8), nn.Linear(8, 2))
    checked = check_exact(model, torch.randn(3, 6), fraction=0.99)
    assert checked.small[0].weight.shape == (1, 6) and checked.small[1].weight.shape == (1, 1)


PARTS = {
    "half": lambda m, x: torch.cat([x, F.max_pool2d(x[:, : m.half], 3, 1, 1)], 1),
    "two of a normalised group": lambda m, x: torch.cat(
        [F.group_norm(x, m.norms), F.max_pool2d(x.narrow(1, 0, m.pair), 3, 1, 1)], 1
    ),
    "a part that is dropped": lambda m, x: (F.group_norm(x, m.norms), F.max_pool2d(x.narrow(1, 0, m.pair), 3, 1, 1))[0],
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_an_axis_is_never_emptied(name: str, seed: int) -> None:
    check_exact(Image(PARTS[name]), Image.example(), fraction=0.99, seed=seed)


# --- the cut model is an ordinary model ------------------------------------------------------------------------------


def test_a_cut_model_trains_saves_and_loads() -> None:
    model = settle(conv.MobileNet())
    x = torch.randn(IMAGE)
    graph = couple(model, x)
    keep = random_keep(graph)
    one, two = cut(model, graph, keep), cut(settle(conv.MobileNet(), seed=1), graph, keep)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(run(two, x), run(one, x))
    one.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in one.parameters())


def test_gradients_and_flags_are_cut_with_their_parameters() -> None:
    model: Any = settle(conv.VGG())
    x = torch.randn(IMAGE)
    graph = couple(model, x)
    model(x).sum().backward()
    model.conv2.weight.requires_grad_(False)
    before = model.conv1.weight.grad.clone()
    cut_(model, cuts(graph, half(graph)), attributes(graph, half(graph)))
    assert not model.conv2.weight.requires_grad and model.conv1.weight.requires_grad
    torch.testing.assert_close(model.conv1.weight.grad, before[::2], rtol=0, atol=0)
    assert model.fc1.weight.grad.shape == model.fc1.weight.shape == (5, 24)


def test_coupling_works_without_data() -> None:
    model = settle(conv.ResNet())
    wanted = {g.name: g.size for g in couple(model, torch.randn(IMAGE)).groups}
    empty = conv.ResNet().to("meta").eval()
    graph = couple(empty, torch.empty(IMAGE, device="meta"))
    assert {g.name: g.size for g in graph.groups} == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_their_type(dtype: torch.dtype) -> None:
    model = settle(Flat(lambda m, x: x)).to(dtype)
    graph = couple(model, Flat.example().to(dtype))
    small: Any = cut(model, graph, half(graph))
    assert small.first.weight.dtype == dtype and small.first.weight.shape == (6, 6)
    assert graph.bytes() == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def test_channels_last_weights_stay_channels_last() -> None:
    model = settle(Image(lambda m, x: x)).to(memory_format=torch.channels_last)
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last).eval()
    check_exact(model, Image.example())
    graph = couple(wide, torch.randn(IMAGE))
    small: Any = cut(wide, graph, half(graph))
    assert small[1].weight.is_contiguous(memory_format=torch.channels_last) and not small[1].weight.is_contiguous()
