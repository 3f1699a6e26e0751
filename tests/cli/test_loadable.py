"""`--loadable transformers` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.llm.streaming.models import write


def test_on_the_command_line(prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in")
    words = ("run", "in", "--recipe", "group_l2", "--target", "params=0.8", "-o", "out")
    done = prunella(*words, "--loadable", "transformers", "--json")
    assert done.code == 0 and done.data["reader"] == "from_pretrained", done.err
    refused = prunella("plan", "in", "--target", "params=0.8", "--loadable", "keras")
    assert refused.code == 2 and "--loadable keras names no reader" in refused.err
