"""The text that both models are judged by, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.app.job import Recovery
from prunella.app.language import HeldOut, held_out_by, held_out_file, held_out_of, judge_lm
from prunella.app.language_job import LanguageModel, masked_job, structural_recipe, usual_recovery
from prunella.cli.llm_request import llm_recipe
from prunella.errors import NotSupported, RequestError
from prunella.llm.calibration import Calibration, Split
from prunella.llm.text import sample_starts, text_tokens, windows_between
from tests.cli.conftest import WORDS, with_words
from tests.llm.streaming.models import write


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in `in` with a tokenizer of words, and a text."""
    monkeypatch.chdir(tmp_path)
    model = write(tmp_path / "in")
    with_words(Path("in"))
    Path("text.txt").write_text(" ".join(WORDS * 20))
    return model


@pytest.mark.parametrize(
    ("starts", "expected"),
    [([], [0, 4, 8, 12]), ([4], [0, 10, 14]), ([0], [6, 10, 14]), ([3, 5, 12], []), ([12], [0, 4, 8])],
)
def test_windows_between_samples(starts: list[int], expected: list[int]) -> None:
    tokens, seqlen, window = 18, 6, 4
    found = windows_between(tokens, starts, seqlen=seqlen, window=window)
    assert found == expected
    taken = {k for start in starts for k in range(start, start + seqlen)}
    used = [k for start in found for k in range(start, start + window)]
    assert not taken & set(used) and len(used) == len(set(used)) and max(used, default=0) < tokens


def test_text_that_calibrates_judges_nothing(dense: Any) -> None:
    calibration = Calibration({"text.txt": 1}, nsamples=4, seqlen=16)
    held_out = held_out_of(Path("in"), calibration, samples=4, seqlen=16)
    assert held_out is not None and held_out.note == "" and held_out.where == "4 other windows of 16 tokens of text.txt"
    tokens = text_tokens("in", "text.txt")
    starts = sample_starts(len(tokens), "text.txt", nsamples=4, seqlen=16, seed=0)
    places = windows_between(len(tokens), starts, seqlen=16, window=16)
    assert {tuple(row.tolist()) for row in held_out.tokens} <= {tuple(tokens[k : k + 16].tolist()) for k in places}


def test_where_no_text_is_left_it_is_said(dense: Any) -> None:
    held_out = held_out_of(Path("in"), Calibration({"text.txt": 1}, nsamples=400, seqlen=16), samples=4, seqlen=16)
    assert held_out is not None and "numbers on it are too good" in held_out.note
    assert held_out_of(Path("in"), Calibration(), samples=4, seqlen=16) is None
    own = held_out_by(dense, samples=3, seqlen=8, seed=0)
    assert own.tokens.shape == (3, 8) and "own text" in own.note
    assert not torch.equal(own.tokens, pr.llm.own_text(dense, nsamples=3, seqlen=8, seed=0).tokens)


def test_a_short_text_is_one_window(dense: Any) -> None:
    Path("short.txt").write_text(" ".join(WORDS[:5]))
    assert held_out_file(Path("in"), "short.txt", samples=9, seqlen=64).tokens.shape == (1, 5)
    Path("short.txt").write_text(WORDS[0])
    with pytest.raises(RequestError, match="a window has 2 at least"):
        held_out_file(Path("in"), "short.txt", samples=9, seqlen=64)


def test_windows_with_pruned_tokens_are_left_out() -> None:
    held_out = HeldOut(torch.tensor([[0, 1], [1, 5], [2, 0]]), "x")
    known = held_out.known_to(torch.tensor([0, 1, 2]))
    assert known.tokens.tolist() == [[0, 1], [2, 0]] and "1 more windows" in known.note
    with pytest.raises(NotSupported, match="nothing is left to judge by"):
        held_out.known_to(torch.tensor([7]))


def test_numbers_are_those_of_the_metrics(dense: Any) -> None:
    small = pr.shrink(dense, pr.llm.drop_blocks(dense, {"input_ids": torch.arange(8)[None]}, ["model.layers.2"]))
    held_out = held_out_file(Path("in"), "text.txt", samples=6, seqlen=12)
    judged = judge_lm(dense, small, held_out)
    flat = held_out.tokens.flatten()
    assert judged.perplexity == tuple(pr.metrics.perplexity(m, flat, window=12).value for m in (dense, small))
    few = [{"input_ids": row[None]} for row in held_out.tokens[:2]]
    assert judged.agreement == pr.metrics.token_agreement(dense, small, few)
    assert judged.samples is None and "there is no tokenizer" in judged.left_out[0]
    text = str(judged)
    assert "perplexity" in text and "tokens a second" in text and judged.data()["perplexity"] == list(judged.perplexity)


def test_what_a_model_cannot_do_is_left_out(dense: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            return self.head(self.table(input_ids))

    judged = judge_lm(Plain(), Plain(), HeldOut(torch.arange(12).view(2, 6), "x"), tokenizer=object())
    assert judged.speed is None and judged.samples is None and len(judged.left_out) == 2
    assert judged.agreement is not None and "no generate()" in " ".join(judged.left_out)


def test_units_and_what_is_usual_for_them() -> None:
    g = pr.granularity
    assert structural_recipe([g.Depth()]).criterion is pr.criteria.block_influence
    assert structural_recipe([g.Channel(), g.Head()]).criterion is pr.criteria.fluctuation
    assert structural_recipe([g.Channel(), g.Width()]).criterion is pr.criteria.activation_norm
    assert structural_recipe([g.Expert()]).criterion is pr.criteria.reap
    assert [str(step) for step in usual_recovery([g.Depth()])] == ["match"] and usual_recovery([g.Width()]) == ()
    for units in ([g.Depth(), g.Head()], [g.Vocabulary((1,)), g.Head()]):
        with pytest.raises(RequestError, match="goes alone"):
            structural_recipe(units)


def test_blocks_that_were_solved_before_a_kill_are_not_solved_again(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LanguageModel(Path("in"), "in", None, "batches")
    batches = [{"input_ids": torch.randint(0, 16, (1, 8))} for _ in range(2)]
    job = masked_job(source, llm_recipe("magnitude", "2:4", None), Split(batches), Recovery(()))
    assert job.planner is not None
    first = job.planner.make(dense, batches[0], tmp_path / "blocks")
    monkeypatch.setattr("prunella.app.language_job.solve_folder", None)
    again = job.planner.make(dense, batches[0], tmp_path / "blocks")
    assert first.masks and all(mask.equal(again.masks[name]) for name, mask in first.masks.items())
