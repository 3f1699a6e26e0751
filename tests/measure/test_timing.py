"""The statistics of a comparison, worked by hand; no test looks at a clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.measure import timing as latency
from prunella.measure.profile import OTHER, peak_memory, time_by_layer
from prunella.measure.timing import LatencySamples, Ratio, compare_latency, paired_ratio

pytestmark = pytest.mark.usefixtures("every_sample")


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.62, 1.55, 1.70), "1.62x faster [1.55, 1.70]"),
        (Ratio(1.02, 0.97, 1.06), "no speed-up on this device (1.02x [0.97, 1.06])"),
        (Ratio(1.02, 1.001, 1.06), "no speed-up on this device (1.02x [1.00, 1.06])"),
        (Ratio(0.5, 0.4, 0.8), "2.00x slower [1.25, 2.50]"),
        (Ratio(3.9, 0.96, 6.2), "the measurement is too noisy to tell (3.90x [0.96, 6.20])"),
        (Ratio(0.9, 0.7, 1.1), "the measurement is too noisy to tell (0.90x [0.70, 1.10])"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict == verdict


def test_a_constant_ratio_has_no_width() -> None:
    assert paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Ratio(2.0, 2.0, 2.0)


def test_pairing_removes_what_both_share() -> None:
    """A drift of the machine by a factor of 5 cancels; drawing both sides apart would give a width of about 1."""
    random = np.random.default_rng(1)
    drift = np.linspace(1, 5, 60)
    base, other = 1.5 * drift * random.normal(1, 0.02, 60), drift * random.normal(1, 0.02, 60)
    found = paired_ratio(list(base), list(other))
    assert 1.4 < found.low < 1.5 < found.high < 1.6 and found.low < found.value < found.high


def test_the_interval_covers_the_truth() -> None:
    """The true ratio of 1 lies in the 95 % interval in about 95 of 100 experiments."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        base, other = random.lognormal(0, 0.2, (2, 30))
        found = paired_ratio(list(base), list(other), resamples=400, seed=trial)
        hits += found.low <= 1 <= found.high
    assert 88 <= hits <= 100


def test_equal_candidates_are_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.cycle([1.0, 1.1, 0.9, 1.2, 0.8])
    monkeypatch.setattr(latency, "_sample", lambda *_, **__: next(ticks))
    assert compare_latency({"a": bool, "b": bool}, rounds=30).ratio.verdict.startswith("no speed-up")


def test_rounds_are_interleaved_in_random_order() -> None:
    called: list[str] = []
    torch.set_num_threads(1)
    candidates = {name: (lambda name=name: called.append(name)) for name in "abc"}
    found = compare_latency(candidates, rounds=6, warmup=0, seed=3)
    assert [one.name for one in found.latencies] == ["a", "b", "c"] and len(found.ratios) == 2
    assert all(len(one.samples) == 6 for one in found.latencies)
    runs = [name for name, _ in itertools.groupby(called)][3:]  # the first three calls find how many make a sample
    assert set(runs) == set("abc") and "".join(runs) != "abc" * 6
    assert found.threads == 1 and "interleaved rounds, 1 threads, cpu" in str(found)


def test_starting_up_after_another_candidate_is_not_timed() -> None:
    now, last = [0.0], [""]

    def call(name: str, seconds: float) -> None:
        now[0] += seconds if last[0] == name else seconds + 0.01
        last[0] = name

    runs = {"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.001), "slow": lambda: call("slow", 0.04)}
    found = compare_latency(runs, rounds=9, clock=lambda: now[0])
    assert [round(one.median, 6) for one in found.latencies] == [0.002, 0.001, 0.05]
    assert found.ratio.value == pytest.approx(2)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert compare_latency({"a": bool, "b": bool}, rounds=5, threads=1).threads == 1
    assert torch.get_num_threads() == before


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match="at least 5 rounds"):
        compare_latency({"a": bool, "b": bool}, rounds=4)
    with pytest.raises(RequestError, match="2 candidates"):
        compare_latency({"a": bool})
    with pytest.raises(RequestError, match="paired ratio"):
        paired_ratio([1.0], [1.0, 2.0])


def test_median_and_quartiles() -> None:
    one = LatencySamples("x", (5.0, 1.0, 2.0, 3.0, 4.0))
    assert one.median == 3 and one.quartiles == (2.0, 4.0)


class Chain(nn.Module):
    """Two convolutions and an addition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) + 1)
        return out


def test_peak_memory_by_hand() -> None:
    net, image = Chain().train(), torch.zeros(1, 3, 10, 10)
    resident = 4 * (3 * 16 + 16 * 4 + 300)
    # the worst moment: the output of `first` and the sum; `second` makes 400 numbers after the former is gone
    assert peak_memory(net, image) == resident + 4 * (1600 + 1600)
    assert net.training


def test_views_and_inplace_operations_take_no_memory() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).view(-1)[2:].relu_().unsqueeze(0)

    assert peak_memory(Views(), torch.zeros(8, 8)) == 4 * 64 * 2


def test_every_layer_gets_its_time() -> None:
    net = Chain()
    found = time_by_layer({"a": net, "b": net}, torch.zeros(1, 3, 10, 10), repeats=3)
    assert found.keys() == {"a", "b"} and found["a"].keys() == {"first", "second", OTHER}
    assert all(seconds >= 0 for layers in found.values() for seconds in layers.values())
    assert not net.first._forward_hooks and not net.first._forward_pre_hooks
