"""The demo from end to end on the digits, with few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunella.app.demo import run_demo
from prunella.app.demo.parts import Effort
from prunella.app.run import Outcome
from prunella.app.verify import check_folder
from prunella.errors import RequestError
from tests.app.demo.job import check, read_in_a_fresh_process

MEASURES = ("accuracy", "agreement (same digit)")
FACTORY = "prunella.app.demo.digits:DigitsNet"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    pytest.importorskip("sklearn")
    effort = Effort(steps=15, training=40)
    return run_demo(tmp_path_factory.mktemp("demo") / "out", model="digits", effort=effort)[1]


def test_the_result_is_complete(outcome: Outcome) -> None:
    check(outcome.saved.path, outcome, MEASURES)
    assert [str(item.step) for item in outcome.recovered] == ["reconstruct", "bn", "distill:15"]


def test_recovery_recovers(outcome: Outcome) -> None:
    dense, cut, recovered = outcome.before, outcome.cut, outcome.after
    assert dense["accuracy"] > 0.8
    assert recovered["agreement (same digit)"] > cut["agreement (same digit)"]
    assert recovered["accuracy"] > dense["accuracy"] - 0.05


def test_the_stored_model_answers_as_recorded_in_a_fresh_process(outcome: Outcome) -> None:
    assert read_in_a_fresh_process(outcome.saved.path, FACTORY) == pytest.approx(
        list(outcome.outputs), rel=1e-4, abs=1e-4
    )


def test_the_folder_passes_verify(outcome: Outcome) -> None:
    verified, small = check_folder(outcome.saved.path, factory=FACTORY)
    assert verified.rebuilt and small is not None
    assert "distill:15" in verified.recovered


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="not empty"):
        run_demo(tmp_path, model="digits")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
