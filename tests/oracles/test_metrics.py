"""Sizes, speeds and side effects against numbers worked by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.measure.count import measured_macs
from prunella.metrics.corruption import CORRUPTIONS
from prunella.metrics.outputs import wilson
from tests.graphs import mlp


def halved() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[:4] = 0  # type: ignore[index, union-attr]
        model[1].weight[:, :4] = 0  # type: ignore[index, union-attr]
        for layer in model:
            layer.bias.fill_(1)  # type: ignore[union-attr, operator]
    return model


# --- 80 ---------------------------------------------------------------------------------------------------------------


def test_compression_is_original_over_new_in_each_scope() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    found = pr.metrics.compression_ratio(dense, halved())
    assert found.weights == 2 and found.parameters == pytest.approx(58 / 34) and found.disk == 1
    small = pr.metrics.compression_ratio(dense, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    assert small.weights == 2 and small.disk == pytest.approx(58 / 30)
    assert str(found) == "compression 2x of the weights, 1.71x of the parameters, 1x of the bytes on disk"


def test_tied_weights_count_once_and_buffers_in_bytes_only() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    single = nn.Sequential(nn.Linear(4, 4, bias=False))
    assert pr.metrics.compression_ratio(tied, single).weights == 1
    single.register_buffer("table", torch.zeros(16))
    found = pr.metrics.compression_ratio(tied, single)
    assert found.weights == 1 and found.parameters == 1 and found.disk == 0.5


def test_nothing_left_has_no_ratio() -> None:
    empty = mlp()
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    with pytest.raises(pr.PruningError, match="nothing remains"):
        pr.metrics.compression_ratio(mlp(), empty)


# --- 81, 82 -----------------------------------------------------------------------------------------------------------


def test_first_convolution_of_lenet() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 6, 5)), torch.zeros(1, 1, 28, 28)
    assert measured_macs(model, x) == 6 * 25 * 24 * 24 == 86_400
    with torch.no_grad():
        model[0].weight[:, :, 0] = 0  # type: ignore[index, union-attr]
    assert pr.metrics.effective_macs(model, x) == pytest.approx(86_400 * 4 / 5)


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 8 * 4 * 9 * 100),
        (nn.Conv2d(4, 8, 3, stride=2), 8 * 4 * 9 * 16),
        (nn.Conv2d(4, 8, 3, dilation=2), 8 * 4 * 9 * 36),
        (nn.Conv2d(4, 8, 3, groups=4), 8 * 1 * 9 * 64),
    ],
)
def test_multiply_adds_from_padding_stride_dilation_and_groups(layer: nn.Module, macs: int) -> None:
    assert measured_macs(nn.Sequential(layer), torch.zeros(1, 4, 10, 10)) == macs


def test_theory_beside_measurement() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    found = pr.metrics.speedup(dense, halved(), torch.zeros(16, 4), rounds=5)
    assert found.macs == (16 * 48, 16 * 48) and found.theoretical == 1 and found.ideal == 2
    assert found.measured == found.latency.ratio.value and found.latency.ratio.low <= found.measured
    assert found.throughput[1] == pytest.approx(16 / found.latency.latencies[1].median)
    assert found.memory[0] > 58 * 4 and "1x fewer, 2x without the zeros" in str(found)


def rapl(root: Path, *values: int) -> None:
    for number, value in enumerate(values):
        for name in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):
            (root / name).mkdir(exist_ok=True)
            (root / name / "energy_uj").write_text(str(value))
            (root / name / "max_energy_range_uj").write_text("1000000")


def test_energy_is_what_the_counters_gained_a_call(tmp_path: Path) -> None:
    rapl(tmp_path, 500_000, 900_000)
    assert pr.metrics.energy(lambda: rapl(tmp_path, 700_000, 100_000), seconds=0, root=tmp_path) == pytest.approx(
        0.2 + 0.2
    )


def test_energy_is_refused_where_it_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(pr.PruningError, match="not measurable here"):
        pr.metrics.energy(lambda: None, root=tmp_path)


# --- 85 ---------------------------------------------------------------------------------------------------------------

A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
B = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 2.0]])


def test_flips() -> None:
    assert pr.metrics.flip_rate(A, B) == 0.5 and pr.metrics.flip_rate(A, A) == 0
    with pytest.raises(pr.PruningError, match="same examples"):
        pr.metrics.flip_rate(A, B[:2])


def test_divergence() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert pr.metrics.kl_divergence(p.log(), q.log()) == pytest.approx(wanted, rel=1e-6)
    assert pr.metrics.kl_divergence(p.log() + 3, p.log()) == pytest.approx(0, abs=1e-7)


def test_calibration_by_hand() -> None:
    sure = torch.tensor([0.95, 0.95, 0.65, 0.65, 0.65], dtype=torch.float64)
    logits = torch.stack((sure, 1 - sure), 1).log()
    labels = torch.tensor([0, 1, 0, 0, 1])
    # bins of a tenth: two of .95 with 1 right, three of .65 with 2 right
    wanted = 2 / 5 * abs(0.5 - 0.95) + 3 / 5 * abs(2 / 3 - 0.65)
    assert pr.metrics.calibration_error(logits, labels, bins=10) == pytest.approx(wanted)
    assert pr.metrics.calibration_error(logits, labels, bins=1) == pytest.approx(abs(3 / 5 - float(sure.mean())))
    # two bins of equal numbers, by confidence: (.65 .65 .65), (.95 .95)
    assert pr.metrics.calibration_error(logits, labels, bins=2, adaptive=True) == pytest.approx(wanted)


def test_wilson_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_classes_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    one = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    two = torch.tensor([[0.0, 1], [0, 1], [1, 0], [0, 1]])
    first, second = pr.metrics.per_class_drop(one, two, labels)
    assert (first.label, first.examples, first.before) == (0, 3, 1) and first.drop == pytest.approx(2 / 3)
    assert first.p == 0.5 and (second.drop, second.p) == (-1, 1)  # 2 lost of 2; 1 won of 1


def test_pies_of_a_synthetic_ensemble() -> None:
    dense = torch.tensor([[0, 1, 2, 2], [0, 1, 2, 1], [1, 1, 0, 0]])
    pruned = torch.tensor([[0, 2, 2, 0], [1, 2, 2, 1], [0, 1, 1, 2]])
    # most frequent: 0 1 2 0 (tie of three) against 0 2 2 0 (tie of three)
    assert pr.metrics.pruning_identified_exemplars(dense, pruned).tolist() == [False, True, False, False]
    assert pr.metrics.flip_rate(torch.eye(3)[dense[0]], torch.eye(3)[pruned[0]]) == 0.5  # what a single seed would say


# --- corruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_repeatable_and_grows(name: str) -> None:
    x = torch.rand(2, 3, 13, 11, generator=torch.Generator().manual_seed(0))
    before, spoil = x.clone(), CORRUPTIONS[name]
    found = [spoil(x, level, 3) for level in range(1, 6)]
    assert all(y.shape == x.shape and y.isfinite().all() for y in found) and x.equal(before)
    assert spoil(x, 3, 3).equal(found[2])
    far = [float((y - x).square().mean()) for y in found]
    assert far[0] > 0 and all(a < b for a, b in pairwise(far))
    with pytest.raises(pr.PruningError, match="five levels"):
        spoil(x, 6, 0)


def test_corruptions_by_hand() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert CORRUPTIONS["pixelate"](x, 2, 0)[0, 0, :2, :2].tolist() == [[2.5, 2.5], [2.5, 2.5]]
    assert CORRUPTIONS["contrast"](x, 2, 0)[0, 0, 0, 0].item() == 7.5 - 7.5 / 2
    assert torch.allclose(CORRUPTIONS["brightness"](x, 4, 0) - x, x.std())
    flat = torch.full((1, 2, 8, 8), 3.0)
    assert torch.allclose(CORRUPTIONS["blur"](flat, 5, 0), flat)


# --- all together -----------------------------------------------------------------------------------------------------


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


def labeled() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(20, 3, 4, 4, generator=g), torch.randint(0, 3, (20,), generator=g)) for _ in range(2)]


def test_side_effects_are_the_parts() -> None:
    dense, pruned, data = classifier(0), classifier(1), labeled()
    found = pr.metrics.side_effects(dense, pruned, data, bins=5, corruptions=("gaussian noise", "contrast"), severity=2)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        a, b = dense(x), pruned(x)
    assert found.flips == pr.metrics.flip_rate(a, b) and found.agreement == 1 - found.flips
    assert found.calibration[1] == pytest.approx(pr.metrics.calibration_error(b, y, bins=5))
    assert found.accuracy == (float((a.argmax(1) == y).double().mean()), float((b.argmax(1) == y).double().mean()))
    assert (
        found.classes == pr.metrics.per_class_drop(a, b, y) and [one.name for one in found.robustness][1] == "contrast"
    )
    assert found == pr.metrics.side_effects(
        dense, pruned, data, bins=5, corruptions=("gaussian noise", "contrast"), severity=2
    )
    assert "predictions that flipped" in str(found) and '"agreement"' in found.json()
    assert dense.training and pruned.training


def test_a_model_beside_itself_has_no_side_effects() -> None:
    found = pr.metrics.side_effects(classifier(0), classifier(0), labeled(), corruptions=("blur",))
    assert found.flips == 0 and found.kl == 0 and all(one.drop == 0 for one in (*found.classes, *found.robustness))


def test_side_effects_say_what_is_wrong() -> None:
    model = classifier(0)
    with pytest.raises(pr.PruningError, match="unknown corruption"):
        pr.metrics.side_effects(model, model, labeled(), corruptions=("fog",))
    with pytest.raises(pr.PruningError, match="no labels"):
        pr.metrics.side_effects(model, model, [torch.zeros(2, 3, 4, 4)])
