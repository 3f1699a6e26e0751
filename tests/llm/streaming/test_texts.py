"""Text that the model writes for a run on a folder: kept beside the result, and taken up again after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunella as pr
from prunella.errors import BadInput, RequestError
from prunella.io.huggingface import COMPANIONS
from prunella.llm.streaming.progress import WORK
from prunella.llm.streaming.texts import TEXT, TOKENS
from tests.llm.streaming.models import read, write

HOW = pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt)
ASKED = pr.llm.Calibration(nsamples=4, seqlen=12, seed=5)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


class Killed(Exception):
    """The process ends."""


def stop(step: object) -> None:
    """After the first block."""
    raise Killed


def test_it_is_the_model_in_memory_with_its_own_text(tmp_path: Path) -> None:
    model = write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED)
    pr.llm.solve_(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, HOW, data=ASKED)
    again = read(tmp_path / "out", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    record = json.loads((tmp_path / "out" / "run.json").read_text())["calibration"]
    stored = json.loads((tmp_path / "out" / TOKENS).read_text())
    assert record["own"] == {"seed": 5, "digest": stored["digest"], "discarded": 1}
    assert record["batches"] == 4 and record["sources"][0]["windows"] == 4
    assert not (tmp_path / "out" / TEXT).exists()  # the folder has no tokenizer


def test_a_killed_run_goes_on_with_the_text_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "whole", HOW, data=ASKED)
    with pytest.raises(Killed):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED, on_block=stop)
    assert (tmp_path / "out" / WORK).is_dir() and (tmp_path / "out" / TOKENS).is_file()
    with pytest.raises(RequestError, match="its data changed"):
        other = pr.llm.Calibration(nsamples=4, seqlen=12, seed=6)
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=other)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it has written its text before")

    monkeypatch.setattr("prunella.llm.calibration.own_text", never)
    done = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED)
    assert done.replayed == 1
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert (tmp_path / "whole" / TOKENS).read_bytes() == (tmp_path / "out" / TOKENS).read_bytes()


def test_a_text_that_was_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in")
    with pytest.raises(Killed):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED, on_block=stop)
    stored = json.loads((tmp_path / "out" / TOKENS).read_text())
    for change in ("1 " * 11 + "2", "no numbers"):
        stored["windows"][0]["tokens"] = change
        (tmp_path / "out" / TOKENS).write_text(json.dumps(stored))
        with pytest.raises(BadInput, match="is damaged"):
            pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED)
    assert TOKENS not in COMPANIONS  # what one model wrote is not passed on with the next


def test_a_finished_text_is_not_taken_for_the_next_run(tmp_path: Path) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED)
    before = (tmp_path / "out" / TOKENS).read_bytes()
    shutil.rmtree(tmp_path / "in")
    write(tmp_path / "in", "GPT2")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED, overwrite=True)
    assert (tmp_path / "out" / TOKENS).read_bytes() != before


def test_a_model_larger_than_the_memory_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in")
    with pytest.raises(RequestError, match="not enough for the model to write its own text"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=ASKED, memory="1MB")
    assert not (tmp_path / "out").exists()
