"""`prunella.sparse` in int8: what is tried, dense int8 as a candidate, what the record says, and NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.app import doctor
from prunella.errors import NotSupported
from prunella.measure.timing import Ratio
from prunella.runtime.fx.fuse import Fused
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind, Precision
from prunella.runtime.kernels.convolution import conv2d
from prunella.runtime.layers import FastLinear, SparseLinear
from prunella.runtime.packed_cache import dense_int8
from prunella.runtime.record import LayerRecord
from prunella.runtime.tuning import configs, tune
from prunella.runtime.tuning.choice import Geometry, Problem, Route, Table, describe, is_dense, is_replacement
from prunella.runtime.tuning.tune import Tuner, Verdict, candidates, configs_for, conv_configs_for, kept_by_blocks

compiled = pytest.mark.skipif(not library.available(), reason="the kernels were not built here")
DOT = (Kind.BLOCK4X4, Kind.BLOCK2X4, Kind.BLOCK1X4)


def blocks(rows: int, columns: int, side: int, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows // side, columns // 4, generator=generator) < density
    return torch.randn(rows, columns, generator=generator) * kept.repeat_interleave(side, 0).repeat_interleave(4, 1)


def layer(weight: Tensor) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(weight.shape[1], weight.shape[0]).eval()
    made.weight.data.copy_(weight)
    return made


def two_layers() -> nn.Module:
    """One layer without zeros, one with blocks of them."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    return nn.Sequential(layer(weight), nn.ReLU(), layer(blocks(32, 48, 4))).eval()


def dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense int8 is always the fastest."""

    def decide(runs: Any, problem: Problem, *_: Any, **__: Any) -> Verdict:
        return Verdict(problem, Route.INT8 if Route.INT8 in runs else Route.TORCH)

    monkeypatch.setattr(tune, "decide", decide)


def test_what_blocks_store() -> None:
    weight = torch.zeros(6, 10)
    weight[0, 0] = weight[1, 9] = weight[5, 9] = 1
    assert kept_by_blocks(weight) == pytest.approx({Kind.BLOCK4X4: 3 / 6, Kind.BLOCK2X4: 3 / 9, Kind.BLOCK1X4: 3 / 18})


@compiled
def test_the_blocks_that_store_least_for_their_speed_are_tried() -> None:
    def kinds(weight: Tensor, tokens: int = 64, precision: Precision = Precision.INT8) -> set[Kind]:
        return {c.kind for c in configs_for(weight, tokens, precision) if c.kind in DOT}

    assert kinds(blocks(64, 256, 4)) == {Kind.BLOCK4X4, Kind.BLOCK2X4}
    assert kinds(blocks(64, 256, 1, 0.1)) == {Kind.BLOCK2X4, Kind.BLOCK1X4}
    assert kinds(blocks(64, 256, 4), tokens=configs.FEW_TOKENS) == set()
    for precision in (Precision.FP32, Precision.BF16):
        assert kinds(blocks(64, 256, 4), precision=precision) == set()
    assert configs.dot_configs({Kind.BLOCK4X4: 0.5}, 65537, 64) == ()


def test_dense_int8_is_a_candidate_of_int8_alone() -> None:
    weight = blocks(32, 64, 4)
    for precision in Precision:
        runs = candidates(weight, None, Problem(16), None, precision, 0, {})
        assert (Route.INT8 in runs) == (precision is Precision.INT8)
    image = weight.reshape(32, 16, 2, 2)
    problem, geometry = Problem(49, (1, 16, 8, 8)), Geometry((2, 2))
    runs = candidates(image, None, problem, geometry, Precision.INT8, 0, {}, fused=Fused())
    assert Route.INT8 not in runs and not any(isinstance(c, Config) and c.kind in DOT for c in runs)


def test_dense_int8_is_dense_and_yet_a_reason_to_replace_a_layer() -> None:
    assert is_dense(Route.INT8) and Route.INT8.portable and describe(Route.INT8) == "dense int8"
    assert [is_replacement(c) for c in (Route.INT8, Route.TORCH, Route.ONEDNN, Config(Kind.ROWS))] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_dense_model_comes_back_in_dense_int8_and_says_so(
    eager_to_skip: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense_wins(monkeypatch)
    torch.manual_seed(0)
    model, x = two_layers(), torch.randn(20, 64)
    quick = pr.sparse(model, x, precision=Precision.INT8, seconds=0.01, fuse=False)
    assert {type(m) for m in quick.modules()} >= {FastLinear, SparseLinear}
    with torch.inference_mode():
        y, wanted = quick(x), model(x)
    difference = float((y - wanted).abs().max() / wanted.abs().max())
    assert 0 < difference < 0.1
    record = pr.runtime.sparsified(quick)
    assert record.outcome.difference == pytest.approx(difference, rel=1e-3)
    assert "2 of 2 layers skip their zeros, but 2 of them run dense int8" in str(record)
    assert f"outputs differ by at most {difference:.1%} of the largest (int8)" in str(record)
    pr.runtime.save_sparse(quick, tmp_path / "quick", factory=f"{__name__}:two_layers")
    with torch.inference_mode():
        assert torch.equal(pr.runtime.load_sparse(tmp_path / "quick", factory=two_layers)(x), y)
        x[3, 5] = float("nan")  # one scale for all tokens: NaN would spread
        assert torch.equal(quick(x).isnan(), model(x).isnan())


@compiled
def test_a_model_in_blocks_runs_int8_kernels(eager_to_skip: None) -> None:
    model = nn.Sequential(layer(blocks(96, 64, 4)), nn.GELU(), layer(blocks(32, 96, 4))).eval()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    layers = {
        name: SparseLinear(part.weight, part.bias, table=Table(((1, Config(Kind.BLOCK4X4, Precision.INT8)),))).eval()
        for name, part in model.named_children()
        if isinstance(part, nn.Linear)
    }
    quick = nn.Sequential(layers["0"], nn.GELU(), layers["2"]).eval()
    with torch.inference_mode():
        y, wanted = quick(x), model(x)
        assert 0 < float((y - wanted).abs().max() / wanted.abs().max()) < 0.02
        x[3, 5] = float("nan")
        assert torch.equal(quick(x).isnan(), model(x).isnan())


def test_float32_never_mentions_a_difference(eager_to_skip: None) -> None:
    quick = pr.sparse(layer(blocks(32, 64, 4)), torch.randn(20, 64), seconds=0.01)
    assert "outputs differ" not in str(pr.runtime.sparsified(quick))


def test_weights_of_other_blocks_are_measured_for_themselves() -> None:
    """Equal density, but what blocks of four columns store differs."""
    along, scattered = torch.zeros(8, 64), torch.zeros(8, 64)
    along[:, :16], scattered[:, ::4] = 1, 1
    for precision, count in ((Precision.INT8, 2), (Precision.FP32, 1)):
        tuner = Tuner(precision, seconds=0.001)
        for weight in (along, scattered):
            tuner.linear(weight, None, (Problem(16),))
        assert len(tuner.known) == count


def test_dense_int8_has_a_scale_for_each_row() -> None:
    weight = torch.tensor([[127.0, -127.0], [1.0, 0.5], [0.0, 0.0]])
    codes, _ = torch.ops.quantized.linear_unpack(dense_int8(weight))
    assert codes.q_per_channel_scales()[:2].tolist() == [1.0, pytest.approx(1 / 127)]
    assert codes.int_repr().tolist() == [[127, -127], [127, 64], [0, 0]]


def test_the_record_names_dense_int8_beside_the_best_kernel() -> None:
    verdict = Verdict(Problem(8), Route.INT8, Config(Kind.BLOCK4X4, Precision.INT8), Ratio(0.8, 0.7, 0.9))
    assert str(LayerRecord("a", 0.5, (verdict,))) == "a  50% zeros  8: dense int8 (block4x4 int8 0.80x)"


@compiled
def test_no_convolution_reads_int8_blocks() -> None:
    """Neither by a choice nor by a file that names one: its packed weight is another structure."""
    weight = library.pack(blocks(8, 36, 4), Config(Kind.BLOCK4X4, Precision.INT8))
    with pytest.raises(NotSupported, match="block4x4"):
        conv2d(weight, torch.randn(1, 4, 8, 8), (3, 3))
    assert not any(c.kind in DOT for c in conv_configs_for(blocks(64, 256, 4), 64, Precision.INT8))


def test_doctor_times_dense_int8_and_blocks_against_it() -> None:
    names = {trial.name: trial for trial in doctor.trials(seconds=0.01) if "int8" in trial.name}
    assert set(names) == {
        "int8 in place of float32, without zeros",
        *(["80 % zero 4x4 blocks, both in int8"] if library.available() else []),
    }
    assert all(trial.dense_ms > 0 and trial.pruned_ms > 0 for trial in names.values())
