"""A metric that fails: every verb that takes one says so in the same way, before any long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

METRICS = """

def m_nan(model):
    return float("nan")

def m_infinite(model):
    return float("-inf")

def m_empty(model):
    return {}

def m_none(model):
    return None

def m_raises(model):
    raise ValueError("no labels in sight")

def m_late(model):
    return 1.0 if model[0].out_channels == 8 else float("inf")

def made(seed):
    torch.manual_seed(seed)
    return net().eval()

def batch():
    return torch.randn(1, 3, 8, 8)
"""
ENDS = {
    "m_nan": (3, "NaN"),
    "m_infinite": (3, "-inf"),
    "m_empty": (2, "must return"),
    "m_none": (2, "must return one number"),
    "m_raises": (3, "no labels in sight"),
}
"""Metric -> exit code, and what is said."""
LONG_WORK = ("planning", "coupling and scoring", "1 of 8", "2 of 8")
"""What the verbs tell of it."""


@pytest.fixture
def metrics(shop: str) -> str:
    file = Path(f"{shop}.py")
    file.write_text(file.read_text() + METRICS)
    return shop


def line(verb: str, module: str, metric: str) -> list[str]:
    net = [f"{module}:net", "--inputs", "1x3x8x8", "--metric", f"{module}:{metric}", "-o", "out"]
    return {
        "run": ["run", *net, "--target", "macs=0.6"],
        "scan": ["scan", *net, "--ratios", "0.25"],
        "pareto": [
            "pareto",
            f"{module}:made",
            "--inputs",
            f"{module}:batch",
            *net[3:],
            "--ratios",
            "2",
            "--seeds",
            "2",
        ],
    }[verb]


@pytest.mark.parametrize("verb", ["run", "scan", "pareto"])
@pytest.mark.parametrize("metric", ENDS)
def test_a_metric_that_fails_is_told_before_any_long_work(prunella: Run, metrics: str, verb: str, metric: str) -> None:
    code, said = ENDS[metric]
    result = prunella(*line(verb, metrics, metric))
    assert result.code == code and said in result.err, result.err
    assert not any(work in result.err for work in LONG_WORK)
    assert "evaluate=" not in result.err and "make=" not in result.err


@pytest.mark.parametrize("verb", ["run", "scan"])
def test_a_pruned_model_is_not_infinitely_good(prunella: Run, metrics: str, verb: str) -> None:
    result = prunella(*line(verb, metrics, "m_late"))
    assert result.code == 3 and "inf" in result.err and not Path("out/run.json").exists()
