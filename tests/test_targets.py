"""Budgets: what is a share, what is a number, and what is neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import RequestError, TargetMissed
from prunella.targets import Target, parse_target

COUNTS = (pr.MACs, pr.Params, pr.Bytes)


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("value", [1.5, 2.25, 99.9, 999.5, np.float32(1.5)])
def test_a_fraction_above_one_is_neither_a_share_nor_a_number(kind: Callable[[float], Target], value: float) -> None:
    with pytest.raises(RequestError, match=r"neither a share nor a number\n.* in \(0, 1\], or an int"):
        kind(value)


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("value", [0.5, 1, 1.0, 2, 400.0, 1e9, 123456.7, np.int64(300)])
def test_shares_and_numbers_are_taken(kind: Callable[[float], Target], value: float) -> None:
    assert kind(value).absolute(dense=1000.0) == (1000.0 * value if value <= 1 else value)


def test_a_latency_above_one_is_in_milliseconds() -> None:
    assert pr.Latency(1.5).absolute(10.0) == 1.5


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 0.5j])
def test_what_is_no_number_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(RequestError, match="is not a budget\na number is needed\nfor example MACs"):
        pr.MACs(value)


@pytest.mark.parametrize("text", ["macs=1.5", "macs=150%", "params=2.5"])
def test_the_command_line_says_the_same(text: str) -> None:
    with pytest.raises(RequestError, match="neither a share nor a number"):
        parse_target(text)
    assert parse_target("bytes=1.2345kb").value == 1234.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flops=0.5", "use --target macs=0.5"),
        ("flops=2G", "use --target macs=1G"),
        ("gflops=3", "use --target macs=1.5G"),
        ("speedup=2", "use --target latency=0.5"),
        ("parameters=0.3", "use --target params=0.3"),
        ("macs=0,5", "did you mean --target macs=0.5?"),
        ("sparsity=80", "did you mean target=Sparsity(0.8), 80 %?"),
        ("params=1.2", "did you mean target=Params(0.83), a share of 1/1.2, or target=Params(1.2e6)"),
    ],
)
def test_targets_in_other_words_get_a_hint(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_target(text)
    assert said in caught.value.todo


def test_a_percentage_without_its_sign_that_cannot_be_met_gets_a_hint() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with pytest.raises(TargetMissed) as caught:
        pr.plan(model, torch.randn(1, 64), target=pr.MACs(50))
    assert "did you mean target=MACs(0.5), 50 %?" in caught.value.todo
    assert not pr.MACs(0.5).hint and not pr.MACs(5000).hint and pr.Params(30).hint


def test_a_small_number_that_is_met_is_told_from_a_percentage() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    plan = pr.plan(model, torch.randn(1, 4), target=pr.MACs(50))
    said = "macs=50 is a number in all, no percentage: did you mean target=MACs(0.5), 50 %?"
    assert plan.after.macs <= 50 and said in plan.remarks
    assert not any("in all" in line for line in pr.plan(model, torch.randn(1, 4), target=pr.MACs(0.5)).remarks)
