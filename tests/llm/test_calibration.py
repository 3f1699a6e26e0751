"""Windows of several sources in proportion to their shares, and what `data=` takes in their place."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import prunella as pr
from prunella.errors import RequestError
from prunella.llm.calibration import windows_of
from prunella.llm.text import text_samples
from tests.llm.streaming.models import write

HOW = pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt)
INPUTS = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer of numbers, and two texts of other numbers beside it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    write(tmp_path / "in")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(k): k for k in range(64)}, "0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "in")
    (tmp_path / "low.txt").write_text(" ".join(str(k % 30) for k in range(200)))
    (tmp_path / "high.txt").write_text(" ".join(str(30 + k % 30) for k in range(200)))
    return tmp_path


@pytest.mark.parametrize("nsamples", [3, 4, 7, 16])
def test_windows_are_as_near_to_the_shares_as_whole_numbers_can_be(nsamples: int) -> None:
    for shares in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 5.0, "b": 3.0, "c": 3.0}):
        counts = windows_of(shares, nsamples)
        exact = [nsamples * share / sum(shares.values()) for share in shares.values()]
        distance = sum((n - x) ** 2 for n, x in zip(counts.values(), exact, strict=True))
        every = itertools.product(range(nsamples + 1), repeat=len(shares))
        best = min(sum((n - x) ** 2 for n, x in zip(c, exact, strict=True)) for c in every if sum(c) == nsamples)
        assert sum(counts.values()) == nsamples and distance == pytest.approx(best)


@pytest.mark.parametrize(
    ("shares", "said"),
    [({"a": 0.0}, "out of range"), ({"a": -1.0}, "out of range"), ({"a": float("inf")}, "out of range"),
     ({}, "no calibration data"), ({"a": 1.0, "b": 1000.0}, "a would give no window")],
)  # fmt: skip
def test_shares_that_make_no_sense(shares: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pr.llm.Calibration(shares, nsamples=4)


def test_each_source_gives_its_windows_and_they_are_mixed(folder: Path) -> None:
    low, high = str(folder / "low.txt"), str(folder / "high.txt")
    asked = pr.llm.Calibration({low: 3, high: 1}, nsamples=16, seqlen=10, seed=2)
    drawn = asked.draw(None, folder=folder / "in")
    rows = torch.cat([batch["input_ids"] for batch in drawn.batches])
    is_high = rows.ge(30).all(1)
    assert is_high.sum() == 4 and rows[~is_high].lt(30).all() and not is_high[-4:].all()
    expected = torch.cat([b["input_ids"] for b in text_samples(folder / "in", high, nsamples=4, seqlen=10, seed=2)])
    assert sorted(rows[is_high].tolist()) == sorted(expected.tolist())
    assert [(s.name, s.share, s.windows) for s in drawn.sources] == [("low.txt", 3, 12), ("high.txt", 1, 4)]
    assert drawn.sources == asked.draw(None, folder=folder / "in").sources


def test_a_single_text_is_drawn_as_ever(folder: Path) -> None:
    low = str(folder / "low.txt")
    drawn = pr.llm.Calibration({low: 0.3}, nsamples=5, seqlen=10, seed=1).draw(None, folder=folder / "in")
    plain = text_samples(folder / "in", low, nsamples=5, seqlen=10, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(drawn.batches, plain, strict=True))


def test_a_model_in_memory_writes_its_own_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(folder / "in")
    asked = pr.llm.Calibration({"auto": 1, str(folder / "low.txt"): 1}, nsamples=6, seqlen=12)
    drawn = asked.draw(model)  # the model names the folder of its tokenizer
    assert drawn.own is not None and len(drawn.own.tokens) == 3 and len(drawn.batches) == 6
    by_request, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    pr.llm.solve_(by_request, INPUTS, HOW, data=asked)
    pr.llm.solve_(by_hand, INPUTS, HOW, data=drawn.batches)
    assert all(torch.equal(a, b) for a, b in zip(by_request.parameters(), by_hand.parameters(), strict=True))
    asked_for: list[int] = []

    def own_text(model: Any, **asked: Any) -> Any:
        asked_for.append(asked["nsamples"])
        return pr.llm.own_text(model, **{**asked, "nsamples": 2, "seqlen": 8})

    monkeypatch.setattr("prunella.llm.calibration.own_text", own_text)
    done = pr.llm.solve_(model, INPUTS, HOW)
    assert asked_for == [128] and {fit.tokens for fit in done.fits if not fit.skipped} == {2 * 8}


def test_what_is_no_data_is_refused(folder: Path) -> None:
    model = write(folder / "in")
    with pytest.raises(RequestError, match=r"data='text\.txt' is not data"):
        pr.llm.solve_(model, INPUTS, HOW, data="text.txt")
    model.config._name_or_path = ""  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="cannot become tokens"):
        pr.llm.solve_(model, INPUTS, HOW, data={str(folder / "low.txt"): 1})
    with pytest.raises(RequestError, match="no model that could write"):
        pr.llm.Calibration().draw(None)
