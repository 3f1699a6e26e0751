"""`bench` times every backend in the same rounds, and says what it left out."""

from __future__ import annotations

import importlib.util
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from prunella.app import backends as benching
from prunella.app.backends import Bench, PairBench, PairTimed, Timed, bench, bench_pair, plot, repeated
from prunella.errors import RequestError
from prunella.measure.timing import Ratio
from prunella.runtime.kernels import library


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    for layer in (model[0], model[2]):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.8  # type: ignore[operator]
    return model.train()


def test_backends_batches_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = net(), torch.get_num_threads()
    found = bench(model, torch.randn(4, 64), backends=("eager", "sparse"), batches=(1, 3), threads=(1,), rounds=5)
    assert [(r.backend, r.batch, r.threads) for r in found.rows] == [
        ("eager", 1, 1), ("sparse", 1, 1), ("eager", 3, 1), ("sparse", 3, 1),
    ]  # fmt: skip
    assert all(r.milliseconds > 0 and r.low <= r.ratio <= r.high for r in found.rows)
    assert "layers skip their zeros" in found.sparse and model.training and torch.get_num_threads() == before
    assert (
        found.kernels == (library.isa() if library.available() else "none") and found.as_dict()["rows"][0]["batch"] == 1
    )


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnxruntime_gets_the_same_input() -> None:
    found = bench(net(), torch.randn(2, 64), backends=("onnxruntime",), threads=(1,), rounds=5)
    assert [r.backend for r in found.rows] == ["eager", "onnxruntime"] or "onnxruntime" in found.left_out


def test_a_backend_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching.shutil, "which", lambda name: None)
    found = bench(net(), torch.randn(2, 64), backends=("compiled",), threads=(1,), rounds=5)
    assert [r.backend for r in found.rows] == ["eager"] and "there is none" in found.left_out["compiled"]


def test_a_batch_repeats_the_first_sample() -> None:
    given = {"ids": torch.arange(6).view(2, 3), "flag": torch.tensor(1.0), "use_cache": False}
    made = repeated(given, 3)
    assert made["ids"].tolist() == [[0, 1, 2]] * 3 and made["flag"].item() == 1 and made["use_cache"] is False


@pytest.mark.parametrize("wrong", [{"backends": ("walk",)}, {"batches": (0,)}, {"batches": ()}, {"threads": (0,)}])
def test_requests_that_make_no_sense(wrong: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(RequestError, match="cannot be measured"):
        bench(net(), torch.randn(2, 64), **wrong)  # type: ignore[arg-type]


def test_the_plot_is_a_picture_that_stands_alone() -> None:
    rows = tuple(
        Timed(backend, b, 1, 1.0, r, r - 0.1, r + 0.1)
        for b in (1, 8)
        for backend, r in (("eager", 1.0), ("sparse", 3.0))
    )
    text = plot(Bench(rows, {}, "", "x", "avx2"))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"  # else no browser draws the file
    words = {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")}
    assert {"batch 1", "batch 8", "sparse", "eager"} <= words and "var(--" not in text


def wide(units: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 8)).train()


def test_two_models_meet_on_every_backend() -> None:
    dense, small = wide(60_000), wide(8)
    found = bench_pair(dense, small, torch.randn(4, 64), backends=("eager", "dense fast"), threads=(1,), rounds=5)
    assert [(row.backend.partition(":")[0], row.batch, row.threads) for row in found.rows] == [
        ("eager", 1, 1), ("dense fast", 1, 1), ("best", 1, 1),
    ]  # fmt: skip
    assert all(row.ratio.value > 1 and row.dense_ms > row.pruned_ms for row in found.rows)
    assert dense.training and small.training and found.as_dict()["verdict"] == found.verdict
    back = bench_pair(small, dense, torch.randn(4, 64), backends=("eager",), threads=(1,), rounds=5)
    assert back.verdict.startswith("no speed-up on this device")


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([(1.0, 0.98, 1.02)], "no speed-up on this device"),
        ([(0.5, 0.4, 0.6)], "no speed-up on this device: it is slower"),
        ([(1.1, 0.5, 2.0)], "no speed-up on this device, as far as so noisy"),
        ([(2.0, 1.9, 2.1), (1.0, 0.9, 1.1)], "faster, but no speed-up is shown at batch 2"),
        ([(2.0, 1.9, 2.1), (1.5, 1.4, 1.6)], "at least 1.50x faster [1.40, 1.60]"),
    ],
)
def test_a_verdict_says_no_more_than_the_intervals(ratios: list[tuple[float, float, float]], said: str) -> None:
    rows = [PairTimed("best: eager, eager", k, 1, 1.0, 1.0, Ratio(*r)) for k, r in enumerate(ratios, 1)]
    assert said in PairBench((*rows, PairTimed("eager", 1, 1, 1.0, 1.0, Ratio(9, 8, 10))), {}, "x", "none").verdict


def test_a_pair_of_nonsense_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be measured"):
        bench_pair(net(), net(), torch.randn(2, 64), backends=("walk",))
