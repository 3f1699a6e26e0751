"""The demo from end to end on the digits, with few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunella.app.demo import run_demo
from prunella.app.demo.run import Effort, Result
from prunella.app.verify import check_whole
from prunella.errors import RequestError
from tests.app.demo.job import check, read_in_a_fresh_process

MEASURES = ("accuracy", "agreement (same digit)")
FACTORY = "prunella.app.demo.digits:DigitsNet"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    pytest.importorskip("sklearn")
    effort = Effort(steps=15, training=40, rounds=5)
    return run_demo(tmp_path_factory.mktemp("demo") / "out", model="digits", effort=effort, show=False)


def test_the_result_is_complete(result: Result) -> None:
    check(result, MEASURES)
    assert [by for by, _ in result.healed] == ["reconstruct", "bn", "distill:15"]


def test_healing_heals(result: Result) -> None:
    dense, cut, healed = result.quality
    assert dense["accuracy"] > 0.8
    assert healed["agreement (same digit)"] > cut["agreement (same digit)"]
    assert healed["accuracy"] > dense["accuracy"] - 0.05


def test_the_stored_model_answers_as_recorded_in_a_fresh_process(result: Result) -> None:
    assert read_in_a_fresh_process(result.folder, FACTORY) == pytest.approx(list(result.probe), rel=1e-4, abs=1e-4)


def test_the_folder_passes_verify(result: Result) -> None:
    proof, small = check_whole(result.folder, factory=FACTORY)
    assert proof.rebuilt and small is not None
    assert "distill:15" in proof.healed


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="not empty"):
        run_demo(tmp_path, model="digits", show=False)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
