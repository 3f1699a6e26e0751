"""What `doctor` says of speed follows from what it measured."""

from __future__ import annotations

import time

import pytest

from prunella.app import doctor
from prunella.app.doctor import Trial


def trial(low: float, high: float) -> Trial:
    return Trial("x", "Channel", 1.0, 1.0, (low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.2, 1.9, "pays"), (0.95, 1.05, "no gain"), (0.3, 0.6, "slower"), (0.5, 3.0, "unclear"), (1.0, 2.0, "unclear")],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert trial(low, high).verdict == verdict


def test_a_job_that_takes_half_the_time_pays() -> None:
    found = doctor._measure(("sleep", "Channel", lambda: time.sleep(0.004), lambda: time.sleep(0.002)), 0.2)
    assert found.dense_ms >= 4 and found.low <= found.ratio <= found.high  # how long a sleep is depends on the machine


def test_extras_say_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package-here", "demo")
    assert doctor.extras()["no-such-package-here"] == "missing: pip install 'prunella[demo]'"


def test_every_extra_exists() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(doctor.EXTRAS.values()) <= set(project["optional-dependencies"])


def test_system_names_torch_and_the_processor() -> None:
    import torch

    found = doctor.system()
    assert found["torch"] == torch.__version__ and int(found["threads"]) == torch.get_num_threads()
