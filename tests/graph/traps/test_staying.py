"""Axes that must stay, with a reason and a place; filters that are made in forward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.traps.nets import SHAPE, half
from tests.oracle import (
    assert_untouched,
    check_exact,
    cut,
    frozen_because,
    masked,
    produced_by,
    run,
    settle,
    snapshot,
)
from tests.zoo import odd
from torch import Tensor, nn

from prunella.graph.solve.groups import couple


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
    assert any(f.where.endswith(f"test_staying.py:{line}") and f.reason for f in found), found
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
        (ChannelAttention(), SHAPE, ("convolution", "slides")),
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
    checked = check_exact(Blur(stored), torch.randn(SHAPE))
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
    graph = check_exact(model, torch.randn(SHAPE)).graph
    assert graph.group("1").size == 10
    assert frozen_because(graph, "0.weight", 0, "mean", "std", "var")


class ScaledStandardised(nn.Conv2d):
    """The same by a batch norm of the weight, as in networks without normalizers."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_batch_norm_of_a_weight_keeps_what_it_averages_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ScaledStandardised(8, 10, 3), nn.Conv2d(10, 4, 1))
    graph = check_exact(model, torch.randn(SHAPE)).graph
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
    graph = check_exact(odd.ChannelBuffers(), torch.randn(SHAPE)).graph
    members = {(m.entity, m.axis) for m in produced_by(graph, "first").members}
    assert members >= {("mean", 0), ("mask", 1), ("scale", 0)}


class Sometimes(nn.Module):
    """A head that runs on what was found, which is nothing in this run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = x.new_zeros(0, 3, 4, 4)
        return self.last(F.relu(self.first(x))), self.norm(self.conv(found)).mean((2, 3))


def test_a_layer_that_nothing_passed_through_stays() -> None:
    graph = couple(settle(Sometimes()), torch.randn(2, 6))
    assert {m.entity for group in graph.groups for m in group.members} == {"first.weight", "first.bias", "last.weight"}
    assert frozen_because(graph, "conv.weight", 0, "nothing passed through it")
