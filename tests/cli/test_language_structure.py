"""`prunella llm` on units and with recovery: a smaller model, judged on text, with a page and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunella as pr
from tests.cli.conftest import WORDS, Run, with_words
from tests.llm.streaming.models import write

TEXT = ("--data", "text.txt", "--nsamples", "4", "--seqlen", "12", "--eval-samples", "2", "--eval-seqlen", "12")


def plain(folder: str = "out") -> Any:
    """What plain transformers reads."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def front_matter(folder: str = "out") -> dict[str, Any]:
    """The head of the card, as a hub reads it."""
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(Path(folder) / "README.md")
    data: dict[str, Any] = card.data.to_dict()
    return data


def test_depth(prunella: Run, story: Any) -> None:
    head = "license: Apache-2.0\nbase_model:\n- owner/parent\nlanguage: [en, de]"
    Path("in/README.md").write_text(f"---\n{head}\n---\nhi")
    done = prunella("llm", "in", "--granularity", "depth", "--target", "params=0.8", *TEXT, "-o", "out")
    assert done.code == 0, done.err
    assert "predicted: " in done.err and "of memory" in done.err
    assert len(plain().model.layers) == 2
    for said in ("perplexity", "same most likely token", "tokens a second", "A sample of text", "recovered by match"):
        assert said in done.out
    data = front_matter()
    assert data["license"] == "apache-2.0" and data["base_model"] == "owner/parent" and data["language"] == ["en", "de"]
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    body = Path("out/README.md").read_text()
    assert "block_influence" in body and "recovered by match" in body
    assert "A sample of text" in Path("out/report.html").read_text()
    assert prunella("verify", "out", "in").code == 0
    record = json.loads(Path("out/run.json").read_text())
    dense, small = record["language"]["perplexity"]
    assert record["quality"][0]["perplexity"] == dense and record["quality"][2]["perplexity"] == small
    assert record["language"]["samples"]["dense"] != ""


@pytest.mark.parametrize(("units", "kind"), [("channel,head", "Llama"), ("width", "Llama"), ("depth", "GPT2"),
                                             ("expert", "Mixtral")])  # fmt: skip
def test_every_unit_is_cut_and_read_by_transformers(
    prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = write(tmp_path / "in", kind)
    with_words(Path("in"))
    Path("text.txt").write_text(" ".join(WORDS * 10))
    done = prunella("llm", "in", "--granularity", units, "--target", "params=0.75", *TEXT, "-o", "out", "--json")
    assert done.code == 0, done.err
    assert done.data["reader"] == "from_pretrained"
    small = plain()
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count <= 0.75 * sum(parameter.numel() for parameter in dense.parameters())
    assert small.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)


def test_structure_is_recovered_by_adapters_and_rounded(prunella: Run, story: Any) -> None:
    words = ("--granularity", "channel", "--target", "params=0.8", "--recover", "lora:2", "--bits", "4")
    done = prunella("llm", "in", *words, *TEXT, "-o", "out", "--json")
    assert done.code == 0, done.err
    assert [step["by"] for step in done.data["recovered"]] == ["lora:2", "quantize:4"]
    small = plain()
    assert all(len(row.unique()) <= 15 for row in small.model.layers[0].mlp.up_proj.weight)
    assert len(small.model.embed_tokens.weight[0].unique()) > 15


@pytest.mark.parametrize("recover", ["lora:2", "distill:2"])
def test_masks_are_recovered_and_stay(prunella: Run, story: Any, recover: str) -> None:
    line = ("llm", "in", "--pattern", "2:4", "--recipe", "wanda", "--recover", recover, *TEXT, "-o", "out")
    done = prunella(*line)
    assert done.code == 0, done.err
    plan = pr.io.load_plan("out/plan.safetensors")
    assert len(plan.masks) == 21 and plan.recipe["pattern"]["kind"] == "NM"
    for name, value in plain().named_parameters():
        if name.endswith("proj.weight"):
            assert value.reshape(-1, 4).eq(0).sum(1).eq(2).all()
            assert not torch.equal(value[value != 0], story.get_parameter(name)[value != 0])
    card = Path("out/README.md").read_text()
    assert "| sparsity of the pruned layers | 0.5000" in card and "| method | by_score of wanda; recovered by" in card
    assert prunella("verify", "out", "in").code == 0 and "recovered by" in done.out
    assert not list(Path().glob(".out*"))


def test_bits_alone_round_every_layer(prunella: Run, story: Any) -> None:
    done = prunella("llm", "in", "--bits", "4", *TEXT, "-o", "out")
    assert done.code == 0, done.err
    small = plain()
    weight = small.model.layers[1].mlp.down_proj.weight
    assert all(len(row.unique()) <= 15 for row in weight) and float((weight == 0).float().mean()) < 0.3
    both = prunella("llm", "in", "--bits", "8", "--pattern", "2:4", *TEXT, "-o", "both")
    assert both.code == 0 and "sparsity 0.5000" in both.out
    assert "prune_and_quantize" in Path("both/README.md").read_text()


def test_a_vocabulary_follows_the_text(prunella: Run, story: Any) -> None:
    few = WORDS[:9]
    Path("few.txt").write_text(" ".join(few * 12))
    line = ("llm", "in", "--granularity", "vocabulary", "--data", "few.txt", *TEXT[2:], "-o", "out")
    done = prunella(*line)
    assert done.code == 0, done.err
    assert "NOT RECOVERED" not in done.out
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert plain().model.embed_tokens.weight.shape[0] == len(tokenizer) < 17
    before, after = (prunella("eval", folder, "--data", "few.txt", "--eval-seqlen", "12", "--json").data for folder in
                     ("in", "out"))  # fmt: skip
    assert after["tokens"] == before["tokens"] and 1 < after["perplexity"] <= before["perplexity"]


def test_what_a_model_in_memory_takes_is_told_first(prunella: Run, story: Any) -> None:
    words = ("llm", "in", "--granularity", "depth", *TEXT, "-o", "out")
    done = prunella(*words, "--dry-run", "--json")
    assert done.code == 0 and done.data["seconds"] > 0 and done.data["bytes"] > 1e6 and not Path("out").exists()
    refused = prunella(*words, "--memory", "10MB")
    assert refused.code == 2 and "10.0 MB of memory are not enough" in refused.err and not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--granularity", "depth", "--pattern", "2:4"), "--granularity does not go with --pattern"),
        (("--granularity", "depth,head"), "depth goes alone"),
        (("--granularity", "vocabulary", "--target", "params=0.5"), "vocabulary takes no --target"),
        (("--granularity", "heads"), "did you mean Head"),
        (("--recover", "match"), "--recover match is for --granularity"),
        (("--recover", "lorra:5"), "cannot read the recovery"),
        (("--recipe", "wanda", "--bits", "4"), "--bits does not go with --recipe wanda"),
        (("--bits", "99"), "out of range"),
        (("--text", "nothere.txt"), "cannot read nothere.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(prunella: Run, story: Any, words: tuple[str, ...], said: str) -> None:
    done = prunella("llm", "in", *words, *TEXT, "-o", "out")
    assert done.code in (2, 3) and said in done.err and not Path("out").exists(), done.err


def test_nothing_is_judged_if_not_asked(prunella: Run, story: Any) -> None:
    done = prunella("llm", "in", "--recipe", "magnitude", *TEXT[:-4], "--eval-samples", "0", "-o", "out")
    assert done.code == 0 and "perplexity" not in done.out and not Path("out/report.html").exists()
    assert "perplexity" not in Path("out/README.md").read_text()


def test_a_model_that_reads_both_ways_has_no_perplexity(
    prunella: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", "Bert")
    with_words(Path("in"))
    Path("text.txt").write_text(" ".join(WORDS * 10))
    for words in (("--recipe", "magnitude"), ("--granularity", "channel")):
        done = prunella("llm", "in", *words, *TEXT, "-o", words[1])
        assert done.code == 0, done.err
        assert "its logits depend on later tokens" in done.out + done.err and "| perplexity" not in done.out
        assert "perplexity" not in Path(words[1], "README.md").read_text()
    assert prunella("eval", "in", "--data", "text.txt", "--eval-seqlen", "12").code == 6


def test_batches_of_a_function_are_tokens_by_name(prunella: Run, story: Any) -> None:
    Path("given.py").write_text("import torch\ndef pairs(): return [(torch.ones(1, 4), 1)]\ndef none(): return []\n")
    for name, said in (("pairs", "its first batch is a tuple"), ("none", "gave no batches")):
        done = prunella("llm", "in", "--granularity", "depth", "--data", f"given.py:{name}", "--eval-samples", "0")
        assert done.code == 2 and said in done.err, done.err


def test_a_text_without_a_known_window_judges_nothing(prunella: Run, story: Any) -> None:
    Path("few.txt").write_text(" ".join(WORDS[:5] * 20))
    Path("other.txt").write_text(" ".join(WORDS * 5))
    line = ("llm", "in", "--granularity", "vocabulary", "--data", "few.txt", "--text", "other.txt", *TEXT[2:])
    done = prunella(*line, "-o", "out")
    assert done.code == 0 and "has a token that was pruned" in done.out, done.err
