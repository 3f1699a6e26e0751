"""`prunella llm` and `prunella compare`: from a folder and a text file to a folder, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunella as pr
from prunella.cli import device
from prunella.cli.parse import LLM_RECIPES
from prunella.io import load as models
from prunella.io.lock import lock_file
from prunella.llm.presets import PRESETS
from tests.cli.conftest import WORDS, Run
from tests.devices.second import second_device
from tests.llm.streaming.models import read, write

LINE = ("llm", "in", "--pattern", "2:4", "--data", "text.txt", "--nsamples", "3")


def test_a_model_is_pruned_by_a_text(prunella: Run, story: Any) -> None:
    done = prunella(*LINE, "--seqlen", "12", "--sparsity", "0.5", "--memory", "64GB", "-o", "out")
    assert done.code == 0, done.err
    assert "21 layers, sparsity 0.5000" in done.out and "suit converters to GGUF" in done.out
    assert "block 3 of 3, model.layers.2: 7 layers" in done.err and "s left" in done.err
    pruned = read(Path("out"), story)
    for name, value in pruned.named_parameters():
        if name.endswith("proj.weight"):
            assert value.view(-1, 4).eq(0).sum(1).tolist() == [2] * (value.numel() // 4)
    assert Path("out/tokenizer.json").read_text() == Path("in/tokenizer.json").read_text()
    card = Path("out/README.md").read_text()
    assert "| method | admm" in card and "3 batches, 36 tokens" in card and "LlamaForCausalLM.from_pretrained" in card
    assert json.loads(Path("out/run.json").read_text())["recipe"]["pattern"] == {
        "kind": "NM", "n": 2, "m": 4, "ragged": False,
    }  # fmt: skip
    assert prunella("inspect", "out", "--inputs", "1x8:int64", "--json").code == 0
    left = lock_file(Path("out"))  # of a run that was killed when its result was complete
    left.touch()
    assert "not empty" in prunella(*LINE, "--seqlen", "12", "-o", "out").err and not left.exists()


def test_no_folder_of_this_machine_is_in_what_is_written(prunella: Run, story: Any) -> None:
    """Of the model, of both texts, of the output; a folder may have spaces in its name."""
    here = Path("Jane Doe").absolute()
    here.mkdir()
    for name in ("in", "text.txt"):
        Path(name).rename(here / name)
    (here / "more.txt").write_text(" ".join(WORDS[::-1] * 10))
    line = (
        "llm",
        str(here / "in"),
        "--data",
        str(here / "text.txt"),
        "--text",
        str(here / "more.txt"),
        "--nsamples",
        "3",
    )
    done = prunella(*line, "--seqlen", "12", "--eval-seqlen", "12", "-o", str(here / "out"))
    assert done.code == 0, done.err
    page = prunella("inspect", str(here / "out"), "--inputs", "1x8:int64", "--html", str(here / "out.html"))
    assert page.code == 0, page.err
    for file in (*(here / "out").iterdir(), here / "out.html"):
        content = file.read_bytes()
        assert b"Jane Doe" not in content and b"Doe/" not in content, file.name
    assert '"name": "text.txt"' in (here / "out" / "run.json").read_text()


def test_without_data_the_model_writes_its_own_text(prunella: Run, story: Any) -> None:
    line = ("llm", "in", "--pattern", "2:4", "--nsamples", "4", "--seqlen", "12", "-o", "out")
    planned = prunella(*line, "--dry-run")
    assert planned.code == 0 and "21 layers" in planned.out and not Path("out").exists(), planned.err
    done = prunella(*line)
    assert done.code == 0, done.err
    assert "no --data, so the model writes its own text: windows of 12 tokens" in done.err.splitlines()[0]
    assert "has written 5 of 5 windows" in done.err
    record = json.loads(Path("out/run.json").read_text())
    own = pr.llm.own_text(story, nsamples=4, seqlen=12)
    assert record["calibration"]["own"] == {"seed": 0, "digest": own.digest, "discarded": 1}
    assert [source["name"] for source in record["calibration"]["sources"]] == ["auto"]
    assert {"calibration.json", "calibration.txt"} <= record["files"].keys()
    assert Path("out/calibration.txt").read_text().count("--- window") == 4
    assert prunella("verify", "out").code == 0


def test_texts_are_mixed_by_their_shares(prunella: Run, story: Any) -> None:
    Path("b.txt").write_text(" ".join(WORDS[::-1] * 10))
    sources = ("--data", "auto:1", "--data", "text.txt:2", "--data", "b.txt:1")
    line = (*sources, "--held-out", "b.txt", "--nsamples", "8", "--seqlen", "12", "-o", "out")
    done = prunella("llm", "in", "--recipe", "sparsegpt", *line)
    assert done.code == 0 and "2 by the model itself, 4 of text.txt, 2 of b.txt" in done.err, done.err
    whole = json.loads(Path("out/run.json").read_text())
    record = whole["calibration"]
    assert len(whole["strengths"]) == 3 and record["batches"] == 8
    assert [(s["name"], s["share"], s["windows"]) for s in record["sources"]] == [
        ("auto", 1, 2), ("text.txt", 2, 4), ("b.txt", 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("text.txt:0.5", "auto"), "some texts have a share"),
        (("text.txt:0.5", "text.txt:1"), "a text is given twice"),
        (("text.txt:0", "auto:1"), "share 0 of text.txt is out of range"),
        (("text.txt:nan", "auto:1"), "out of range"),
        (("text.txt", "module:function"), "no text file module:function"),
        (("auto:1", "text.txt:1000"), "auto would give no window"),
    ],
)
def test_texts_that_cannot_be_mixed(prunella: Run, story: Any, words: tuple[str, ...], said: str) -> None:
    sources = [part for word in words for part in ("--data", word)]
    done = prunella("llm", "in", *sources, "--nsamples", "4", "--seqlen", "12", "-o", "out")
    assert done.code == 2 and said in done.err and not Path("out").exists()


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(prunella: Run, story: Any) -> None:
    data = prunella(*LINE, "--seqlen", "12", "--dry-run", "--json", "-o", "out").data
    assert data["blocks"] == 3 and data["layers"] == 21 and data["seconds"] > 0
    assert data["weights"] == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert data["peak"]["together"] == sum(v for k, v in data["peak"].items() if k != "together")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seqlen", "500"), "has 170 tokens"),
        (("--seqlen", "12", "--target", "macs=0.5"), "--target needs --granularity"),
        (("--seqlen", "12", "--recipe", "taylor"), "no recipe 'taylor' for language models"),
        (("--seqlen", "12", "--sparsity", "0.7"), "2:4 removes 0.5"),
        (("--seqlen", "12", "--memory", "20MB"), "20.0 MB of memory are not enough"),
        (("--seqlen", "12", "--memory", "some"), "cannot read the amount"),
        (("--seqlen", "12", "--skip", "nothing"), "matches nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(prunella: Run, story: Any, words: tuple[str, ...], said: str) -> None:
    done = prunella(*LINE, *words, "-o", "out")
    assert done.code == 2 and said in done.err and not Path("out").exists()


def test_a_model_without_a_folder_or_a_tokenizer(prunella: Run, story: Any) -> None:
    assert "not a language model that can be read" in prunella("llm", "nowhere", "--data", "text.txt").err
    for file in Path("in").glob("tokenizer*"):
        file.unlink()
    assert prunella(*LINE, "--seqlen", "12").code == 3


def test_each_verb_has_its_own_options_only(prunella: Run) -> None:
    for words in (
        ("run", "in", "--memory", "1GB"),
        ("run", "in", "--sparsity", "0.25"),
        ("llm", "in", "--loss", "m:f"),
    ):
        refused = prunella(*words)
        assert refused.code == 2 and "No such option" in refused.err


def test_names_of_recipes_are_those_of_the_library(prunella: Run) -> None:
    help_text = " ".join(prunella("llm", "--help").out.split())
    assert set(PRESETS) == {*LLM_RECIPES, "wanda", "ria", "magnitude"}
    assert ", ".join(list(PRESETS)[:-1]) + " or magnitude." in help_text


def test_a_score_goes_block_by_block(prunella: Run, story: Any) -> None:
    line = ("llm", "in", "--recipe", "wanda", "--data", "text.txt", "--nsamples", "3", "--seqlen", "12")
    done = prunella(*line, "--sparsity", "0.25", "-o", "out")
    assert done.code == 0 and "21 layers, sparsity 0.2500" in done.out, done.err
    pruned = read(Path("out"), story)
    for name, value in pruned.named_parameters():
        if name.endswith("proj.weight"):  # every row alike, and no weight has moved
            assert value.eq(0).sum(1).tolist() == [value.shape[1] // 4] * len(value)
            assert torch.equal(value[value != 0], story.get_parameter(name)[value != 0])


COMPARE = ("compare", "in", "--data", "text.txt", "--text", "other.txt", "--recipe", "sparsegpt", "--recipe", "wanda",
           "--nsamples", "3", "--seqlen", "12", "--eval-seqlen", "10", "--seeds", "2", "-o", "table")  # fmt: skip


def test_recipes_in_one_table_of_a_model(prunella: Run, story: Any) -> None:
    Path("other.txt").write_text(" ".join(WORDS[::-1] * 5))
    data = prunella(*COMPARE, "--json").data
    assert list(data["values"]) == ["dense", "sparsegpt", "wanda"] and data["seeds"] == [0, 1]
    assert data["values"]["dense"]["KL"] == [0, 0] and data["values"]["dense"]["top-1"] == [1, 1]
    assert all(value > 0 for value in data["values"]["wanda"]["KL"] + data["values"]["sparsegpt"]["seconds"])
    assert "8 windows of 10 tokens of other.txt" in data["protocol"] and "2 of them for KL" in data["protocol"]
    again = prunella(*COMPARE)
    assert "| sparsegpt |" in again.out and "seed" not in again.err  # nothing was made again
    assert "not continued" in prunella(*COMPARE, "--sparsity", "0.7").err
    Path("other.txt").write_text(" ".join(WORDS * 5))
    assert "not continued" in prunella(*COMPARE).err


def test_a_text_that_calibrates_and_judges_is_told(prunella: Run, story: Any) -> None:
    Path("other.txt").write_bytes(Path("text.txt").read_bytes())  # another name, the same bytes
    result = prunella(*COMPARE[:7], "magnitude", *COMPARE[10:-4], "--seeds", "1", "-o", "one", "--json")
    assert result.code == 0, result.err
    assert "other.txt is the calibration text" in result.err and "both are the same text" in result.data["protocol"]


def test_a_table_of_the_model_by_the_library(prunella: Run, story: Any) -> None:
    from prunella.llm.text import text_samples, text_tokens

    Path("other.txt").write_text(" ".join(WORDS[::-1] * 5))
    data = prunella(*COMPARE, "--json").data
    batches = text_samples("in", "text.txt", nsamples=3, seqlen=12, seed=1)
    pr.llm.solve_(story, batches[0], PRESETS["wanda"](pr.Element(), 0.5), data=batches)
    tokens = text_tokens("in", "other.txt")
    assert data["values"]["wanda"]["perplexity"][1] == pytest.approx(
        pr.metrics.perplexity(story, tokens, window=10).value
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--recipe", "nothing"), 2, "no recipe 'nothing' for language models"),
        (("--seeds", "0"), 2, "nothing to compare"),
        (("--eval-seqlen", "500"), 2, "shorter than one window"),
        (("--text", "nothere.txt"), 3, "cannot read nothere.txt"),
    ],
)
def test_a_comparison_that_makes_no_sense(
    prunella: Run, story: Any, words: tuple[str, ...], code: int, said: str
) -> None:
    Path("other.txt").write_text(" ".join(WORDS[::-1] * 5))
    done = prunella(*COMPARE, *words)
    assert done.code == code and said in done.err


def test_a_package_is_unpacked_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def unpack(file: Path, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        made.append(file)
        return folder

    package = tmp_path / "packed_llm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(models.PACKAGES, "tiny", ("packed_llm", "tiny.gguf", "packed-llm"))
    monkeypatch.setattr(models, "_unpack_gguf", unpack)
    folder = models.model_folder("tiny")
    assert folder == models.model_folder("tiny") == models.model_folder(str(package / "tiny.gguf"))
    assert folder.parent == tmp_path / "cache" and made == [package / "tiny.gguf"]
    (package / "tiny.gguf").write_bytes(b"GGUF, another")
    assert models.model_folder("tiny") != folder and len(made) == 2


def test_a_dequantized_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    import prunella as pr

    model: Any = write(tmp_path / "in")
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = object()
    pr.save(model, tmp_path / "out", source=tmp_path / "in")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = read(tmp_path / "out", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert models.unquantize_(model).hf_quantizer is None and not hasattr(model.config, "quantization_config")


def test_a_text_that_is_not_there_is_named(prunella: Run, story: Any) -> None:
    done = prunella("llm", "in", "--data", "nothere.txt", "-o", "out")
    assert done.code == 2 and "there is no text file nothere.txt" in done.err


def test_it_is_pruned_on_another_device_and_judged_there(
    prunella: Run, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "check_device", lambda name: None)
    line = (*LINE, "--seqlen", "12", "--device", "lazy:0")
    with second_device():
        done = prunella(*line, "-o", "out")
        assert done.code == 0 and "memory of the device" in done.err, done.err
        assert "perplexity" in done.out
        forecast = json.loads(prunella(*line, "--dry-run", "--json").out)
    assert forecast["there"]["together"] > forecast["there"]["work"] > 0 and forecast["peak"]["work"] == 0
    for name, value in read(Path("out"), story).named_parameters():
        if name.endswith("proj.weight"):
            assert value.view(-1, 4).eq(0).sum(1).tolist() == [2] * (value.numel() // 4)
    refused = prunella(*LINE, "--seqlen", "12", "-o", "out", "--overwrite", "--device", "cpu")
    assert refused.code == 0  # a finished result may be replaced from anywhere


def test_several_processes_share_no_accelerator(prunella: Run, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "check_device", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = prunella(*LINE, "--seqlen", "12", "-o", "out", "--device", "lazy:0")
    assert done.code == 6 and "several processes do not prune block by block on lazy:0" in done.err
    assert not Path("out").exists()
