"""Every small model is cut exactly, and the groups that must be found are found: freezing everything fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle import Mode, check_exact, frozen_because, produced_by
from tests.zoo import convolutional as conv
from tests.zoo import odd

IMAGE, VECTOR, TOKENS = (2, 3, 8, 8), (3, 6), (2, 5, 16)


@dataclass(frozen=True)
class Case:
    """A model with its input's shape; `expect`: producer -> units (None: two or more); `frozen`: entity -> axis."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    expect: Mapping[str, int | None]
    frozen: Mapping[str, int] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ("all", "readers")
    count: bool = True


HEADS = {"attention.query", "attention.key", "attention.value", "qkv"}
RESNET = {"block1.conv1.0": 8, "block2.conv1.0": 12, "block3.conv1.0": 12}
BOTTLENECK = {"stem.0": 8, "block1.expand.0": 16, "block2.expand.0": 16}
PLAIN = {"block1.reduce.0": 12, "block1.conv.0": 12, "block2.reduce.0": 12}
GROUPED = {"block1.reduce.0": None, "block1.conv.0": None, "block2.conv.0": None}
CASES = {
    "vgg": Case(conv.VGG, IMAGE, {"conv1": 8, "conv2": 12, "fc1": 10}, {"fc2.weight": 0}),
    "resnet": Case(conv.ResNet, IMAGE, {"stem.0": 8, "block2.conv2.0": 12, **RESNET}, {"fc.weight": 0}),
    "resnet option a": Case(lambda: conv.ResNet(option_a=True), IMAGE, {"stem.0": 8, **RESNET}, {"fc.weight": 0}),
    "bottleneck": Case(conv.BottleneckNet, IMAGE, BOTTLENECK | PLAIN, {"fc.weight": 0}),
    "resnext": Case(lambda: conv.BottleneckNet(groups=4), IMAGE, BOTTLENECK | GROUPED, {"fc.weight": 0}),
    "densenet": Case(conv.DenseNet, IMAGE, {"stem": 8, "convs.0": 6, "convs.1": 6, "convs.2": 6}, {"fc.weight": 0}),
    "mobilenet": Case(conv.MobileNet, IMAGE, {"stem.0": 8, "block1.expand.0": 16, "block2.expand.0": 24}),
    "shufflenet": Case(conv.ShuffleNet, IMAGE, {"stem.0": None, "unit1.first.0": 8, "unit2.first.0": 8}),
    "squeeze excite": Case(conv.SqueezeExcite, IMAGE, {"stem.0": 12, "down": 6}, {"conv.weight": 0}),
    "unet": Case(
        conv.UNet,
        IMAGE,
        {"down1.0": 8, "down2.0": 12, "down3.0": 16, "up2": 12, "mix2.0": 12, "mix1.0": 8},
        {"out.weight": 0},
    ),
    "group norm": Case(conv.GroupNormNet, IMAGE, {"conv1": 4, "conv2": 8}, {"conv3.weight": 0}),
    "inception": Case(
        conv.Inception, IMAGE, {"stem.0": 8, "one.0": 4, "three.0.0": 6, "three.2.0": 8, "pooled.0": 4, "mix.0": 10}
    ),
    "waves": Case(conv.Waves, (2, 2, 16), {"conv1": 8, "conv2": 12}, {"out.weight": 0}),
    "depth multiplier": Case(conv.Multiplier, IMAGE, {"conv1": 6}, {"conv2.weight": 0}),
    "pixel shuffle": Case(conv.PixelShuffle, IMAGE, {"conv1": 6, "conv2": 8}, {"conv3.weight": 0}),
    "channels last": Case(conv.ChannelsLast, IMAGE, {"stem": 8, "wide": 20}, {"out.weight": 0}),
    "shared twice": Case(odd.SharedTwice, VECTOR, {"first": 12, "shared": 12}, {"last.weight": 0}),
    "tied autoencoder": Case(odd.TiedAutoencoder, (3, 10), {"middle": 16}, {}, modes=("all",)),
    "unused": Case(odd.Unused, VECTOR, {"first": 12}, {"last.weight": 0}),
    "weight norm": Case(odd.WeightNorm, VECTOR, {"first": 12, "wide": 16}, {"last.weight": 0}),
    "normalized weight": Case(odd.Normalized, VECTOR, {"wide": 16}, {"first.weight": 0}),
    "gated chunk": Case(odd.GatedChunk, VECTOR, {"first": 12, "down": 8, "second": 10}, {"last.weight": 0}),
    "normed blocks": Case(odd.NormedBlocks, VECTOR, {"up1": 20, "up2": 16}, {"embed.weight": 0, "down2.weight": 0}),
    "detached": Case(odd.Detached, VECTOR, {"first": 12, "second": 12}, {"last.weight": 0}),
    "channel buffers": Case(odd.ChannelBuffers, IMAGE, {"first": 10}, {"last.weight": 0}),
    "attention": Case(
        odd.AttentionBlock, TOKENS, {"attention.query": 4, "attention.value": 4, "up": 24}, {"down.weight": 0}
    ),
    "attention by hand": Case(lambda: odd.AttentionBlock(fused=False), TOKENS, {"attention.key": 4, "up": 24}),
    "grouped queries": Case(
        lambda: odd.AttentionBlock(kv_heads=2), TOKENS, {"attention.query": 2, "attention.key": 2, "up": 24}
    ),
    "grouped queries by hand": Case(
        lambda: odd.AttentionBlock(kv_heads=2, fused=False), TOKENS, {"attention.query": 2}
    ),
    "packed attention": Case(odd.PackedAttention, TOKENS, {"qkv": 4}, {"proj.weight": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_masked_and_expected_groups_exist(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    checked = check_exact(case.build(), torch.randn(case.shape), modes=case.modes, count=case.count)
    assert checked.moved > 1e-6, "the cut did nothing"
    for producer, size in case.expect.items():
        found = produced_by(checked.graph, producer)
        assert found.size == size if size else found.size >= 2, f"{producer}: {found.size} units"
        assert found.kind == ("head" if producer in HEADS else "channel")
    for entity, axis in case.frozen.items():
        assert frozen_because(checked.graph, entity, axis), f"{entity} axis {axis} is not reported as frozen"


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "group norm", "grouped queries", "densenet"])
@pytest.mark.parametrize(("fraction", "seed"), [(0.01, 1), (0.7, 2), (0.99, 3)])
def test_any_share_is_exact(name: str, fraction: float, seed: int) -> None:
    case = CASES[name]
    torch.manual_seed(seed)
    check_exact(case.build(), torch.randn(case.shape), fraction=fraction, seed=seed, modes=case.modes)


def test_a_tied_weight_is_cut_on_both_ways() -> None:
    torch.manual_seed(0)
    checked = check_exact(odd.TiedAutoencoder(), torch.randn(3, 10), modes=("all",))
    members = {(m.entity, m.axis) for m in produced_by(checked.graph, "middle").members}
    assert members == {
        ("encoder.weight", 0),
        ("encoder.bias", 0),
        *(("middle.weight", k) for k in (0, 1)),
        ("middle.bias", 0),
    }


def test_tied_embedding_and_head_are_one_group() -> None:
    torch.manual_seed(0)
    tokens: Any = torch.arange(10).view(2, 5)
    checked = check_exact(odd.TiedLanguageModel(), tokens, modes=("all",))
    stream = produced_by(checked.graph, "down")
    assert stream.size == 12 and produced_by(checked.graph, "up").size == 24
    assert ("embed.weight", 1) in {(m.entity, m.axis) for m in stream.members}
    assert checked.graph.entities["embed.weight"].names == ("embed.weight", "head.weight")
    assert frozen_because(checked.graph, "embed.weight", 0)
    assert checked.small.head.weight is checked.small.embed.weight


def test_unused_parameters_are_named_and_whole() -> None:
    checked = check_exact(odd.Unused(), torch.randn(VECTOR))
    assert set(checked.graph.unused) >= {"never.weight", "never.bias", "spare"}
    assert not checked.graph.entities["spare"].used and checked.graph.entities["first.weight"].used
    assert checked.small.never.weight.shape == (12, 12) and checked.small.spare.shape == (12,)


def test_batch_norm_travels_with_its_filter() -> None:
    checked = check_exact(conv.VGG(), torch.randn(IMAGE))
    members = {(m.entity, m.axis, m.role) for m in produced_by(checked.graph, "conv1").members}
    assert members == {
        ("conv1.weight", 0, "out"),
        ("conv1.bias", 0, "bias"),
        ("bn1.weight", 0, "scale"),
        ("bn1.bias", 0, "shift"),
        ("bn1.running_mean", 0, "stat"),
        ("bn1.running_var", 0, "stat"),
        ("conv2.weight", 1, "in"),
    }


def test_one_channel_is_four_columns_after_flatten() -> None:
    checked = check_exact(conv.VGG(), torch.randn(IMAGE))
    reader = next(m for m in produced_by(checked.graph, "conv2").members if m.entity == "fc1.weight")
    assert (reader.axis, reader.role) == (1, "in")
    assert reader.index[reader.unit == 3].tolist() == [12, 13, 14, 15]
    assert checked.small.fc1.in_features == checked.small.fc1.weight.shape[1]
