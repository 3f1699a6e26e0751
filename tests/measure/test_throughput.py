"""Tokens a second, from times that are given here, and a cache that is as it was after every round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.measure.throughput import Throughput, _writer
from prunella.measure.timing import Comparison, LatencySamples, Ratio
from tests.llm.nets import language_model, windows


def times(*seconds: float) -> Comparison:
    latencies = tuple(LatencySamples(name, (s,) * 5) for name, s in zip(("dense", "pruned"), seconds, strict=True))
    return Comparison(latencies, (Ratio(seconds[0] / seconds[1], 1.5, 2.5),), 1, "cpu", 5, 1, 0)


def test_rates_are_tokens_over_seconds() -> None:
    found = Throughput(times(0.5, 0.25), times(2.0, 1.0), prompt=100, new=8, batch=3)
    assert found.rates() == {"prefill": (600.0, 1200.0), "decode": (12.0, 24.0)}
    assert "decode: 12 -> 24 tokens a second, 2.00x faster" in str(found) and "3 x 100 tokens read, 8" in str(found)
    assert found.data()["ratios"]["prefill"] == {"value": 2.0, "low": 1.5, "high": 2.5}


def test_a_round_writes_the_same_words_again() -> None:
    model, prompt = language_model(), windows(1)[0]["input_ids"][:2]
    with torch.no_grad():
        run = _writer(model, prompt, 3)
        words = run()
        assert torch.equal(run(), words)
        text = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(text[:, -1:], words)


def test_both_models_are_measured_and_left_as_they_were() -> None:
    model, data = language_model().train(), windows(1)
    small = pr.shrink(model, pr.llm.drop_blocks(model, data[0], ["model.layers.1"]))
    found = pr.metrics.throughput(model, small, data[0]["input_ids"][:1, :6], new=2, rounds=5)
    assert found.prompt == 6 and found.batch == 1 and found.prefill.rounds == 5 and model.training
    assert all(rate > 0 for pair in found.rates().values() for rate in pair)


class Plain(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return torch.zeros(*input_ids.shape, 3)


def test_what_cannot_be_timed_is_said() -> None:
    with pytest.raises(NotSupported, match="decode cannot be timed"):
        pr.metrics.throughput(Plain(), Plain(), torch.zeros(1, 3, dtype=torch.int64), rounds=5)
    with pytest.raises(RequestError, match="a prompt"):
        pr.metrics.throughput(Plain(), Plain(), torch.zeros(3, dtype=torch.int64))
