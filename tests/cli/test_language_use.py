"""`prunella eval` and `prunella chat` on dense models and on results."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.llm.generate import continued
from prunella.llm.text import text_tokens
from tests.cli.conftest import WORDS, Run


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """What is typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_perplexity_is_that_of_the_library(prunella: Run, story: Any) -> None:
    done = prunella("eval", "in", "--data", "text.txt", "--eval-seqlen", "10", "--json")
    tokens = text_tokens("in", "text.txt")
    assert done.code == 0 and done.data["perplexity"] == pr.metrics.perplexity(story, tokens, window=10).value
    assert done.data["tokens"] == 170
    assert (
        "17 windows of 10 tokens of text.txt" in prunella("eval", "in", "--data", "text.txt", "--eval-seqlen", "10").out
    )


def test_two_models_on_one_text(prunella: Run, story: Any, tmp_path: Path) -> None:
    plan = pr.llm.drop_blocks(story, {"input_ids": torch.tensor([[1, 2, 3]])}, ["model.layers.1"])
    pr.save(pr.shrink(story, plan), "small", plan=plan, source="in")
    done = prunella("eval", "small", "--data", "text.txt", "--dense", "in", "--eval-seqlen", "10", "--json")
    assert done.code == 0, done.err
    dense, small = done.data["perplexity"]
    assert dense != small and 0 < done.data["agreement"]["top1"] <= 1 and done.data["speed"]["new"] == 16
    Path("in/tokenizer.json").write_text(Path("in/tokenizer.json").read_text().replace('"the"', '"thee"'))
    other = prunella("eval", "small", "--data", "text.txt", "--dense", "in", "--eval-seqlen", "10")
    assert other.code == 2 and "as other tokens" in other.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere", "--data", "text.txt"), "not a folder of a language model"),
        (("in", "--data", "nothere.txt"), "cannot read nothere.txt"),
        (("in", "--data", "text.txt", "--eval-samples", "0"), "nothing to evaluate on"),
    ],
)
def test_what_cannot_be_evaluated(prunella: Run, story: Any, words: tuple[str, ...], said: str) -> None:
    done = prunella("eval", *words)
    assert done.code in (2, 3) and said in done.err and done.out == ""


def test_a_talk_in_a_pipe(prunella: Run, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "the cat\n\nsat on")
    done = prunella("chat", "in", "--new", "3", "--json")
    assert done.code == 0 and "no chat template" in done.err
    first, second = done.data["turns"]
    assert (first["prompt"], second["prompt"]) == ("the cat", "sat on")
    words = story.generate(torch.tensor([[0, 1]]), max_new_tokens=3, do_sample=False)[0, 2:].tolist()
    assert len(words) == 3 and first["answer"].split() == [WORDS[k] for k in words if k < len(WORDS)]
    say(monkeypatch, "the cat\n")
    assert prunella("chat", "in", "--new", "3").out.strip() == first["answer"].strip()


def test_a_template_makes_turns(prunella: Run, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}mat")
    seen: list[list[int]] = []

    def heard(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(prompt[0].tolist())
        return torch.tensor([3])

    monkeypatch.setattr("prunella.llm.generate.continued", heard)
    say(monkeypatch, "the cat\nsat")
    assert prunella("chat", "in").out == f"{WORDS[3]}\n{WORDS[3]}\n"
    assert seen == [[0, 1, 5], [0, 1, 3, 2, 5]]


def test_draws_depend_on_the_seed_alone(story: Any) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    before = torch.get_rng_state()
    one, again, other = (continued(story, prompt, new=12, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(before, torch.get_rng_state())
    assert len(continued(story, torch.zeros(1, 60, dtype=torch.long), new=50)) <= 4  # 64 positions


def test_what_cannot_be_written(story: Any) -> None:
    with pytest.raises(NotSupported, match="no generate"):
        continued(torch.nn.Linear(2, 2), torch.tensor([[1]]))
    for options in ({"new": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(RequestError, match="no text can be written"):
            continued(story, torch.tensor([[1]]), **options)
    with pytest.raises(RequestError, match="no room"):
        continued(story, torch.zeros(1, 64, dtype=torch.long))
