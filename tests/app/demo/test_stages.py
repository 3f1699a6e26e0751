"""Progress goes to stderr, one line a stage where that is no terminal, and nowhere when it is not asked for."""

from __future__ import annotations

import pytest

from prunella.app.demo.stages import Stages, counted


def test_a_line_for_each_stage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.stage("first", 3) as tick:
        assert list(counted([1, 2, 3], tick)) == [1, 2, 3]
    with stages.stage("second") as tick:
        tick(5, "anything")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split()[0] for line in shown.err.splitlines()] == ["first", "second"]
    assert list(stages.seconds) == ["first", "second"]


def test_nothing_when_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages(show=False).stage("quiet", 2) as tick:
        tick()
    assert capsys.readouterr() == ("", "")


def test_a_stage_that_fails_is_not_counted() -> None:
    stages = Stages(show=False)
    with pytest.raises(ZeroDivisionError), stages.stage("broken"):
        1 / 0  # noqa: B018
    assert stages.seconds == {}
