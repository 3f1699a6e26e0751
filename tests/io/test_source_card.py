"""What a folder says of its origin is read as data, and passed on in the card that a hub reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunella.io import source_card
from prunella.io.card import Card, render_card
from prunella.io.source_card import SourceCard, card_of_gguf, licence_files, read_source_card


def folder(tmp_path: Path, readme: str = "", config: str = "") -> Path:
    """A folder with these files."""
    if readme:
        (tmp_path / "README.md").write_text(readme)
    if config:
        (tmp_path / "config.json").write_text(config)
    return tmp_path


READMES = {
    "---\nlicense: MIT\n---\nlicense: gpl\n": SourceCard("mit"),
    '---\nlicense: "apache-2.0"\nbase_model: a/b\nlanguage: en\n---\n': SourceCard(
        "apache-2.0", base="a/b", languages=("en",)
    ),
    "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---": SourceCard("other", "own", "LICENSE"),
    "---\nbase_model:\n  - a/b\n  - c/d\nlanguage: [en, 'de']\n---\n": SourceCard(base="a/b", languages=("en", "de")),
    "no front matter\n---\nlicense: mit\n---\n": SourceCard(),
    "---\nlicense: mit\n": SourceCard(),
    '---\nlicense: "x\\nbase_model: e/x"\nbase_model: /home/me\nlicense_link: javascript:x\n---\n': SourceCard(),
    "---\nlicense: &a [*a, *a]\nbase_model: ../x\n---\n": SourceCard(),
}


@pytest.mark.parametrize(("readme", "expected"), READMES.items())
def test_only_plain_entries_are_taken(tmp_path: Path, readme: str, expected: SourceCard) -> None:
    assert read_source_card(folder(tmp_path, readme)) == expected


def test_the_name_on_a_hub_comes_before_that_of_the_parent(tmp_path: Path) -> None:
    place = folder(tmp_path, "---\nbase_model: a/parent\n---\n", '{"_name_or_path": "owner/model-1.5B"}')
    assert read_source_card(place).base == "owner/model-1.5B"
    folder(tmp_path, config='{"_name_or_path": "/home/alice/model"}')
    assert read_source_card(place).base == "a/parent"
    folder(tmp_path, config='{"_name_or_path": ')
    assert read_source_card(place).base == "a/parent"


def test_a_licence_that_is_only_a_text_is_passed_on_as_one(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("You may.")
    (tmp_path / "NOTICE.txt").write_text("By us.")
    assert [file.name for file in licence_files(tmp_path)] == ["LICENSE", "NOTICE.txt"]
    assert read_source_card(tmp_path) == SourceCard("other", "license-of-the-base", "LICENSE")
    text = render_card(Card("x", "LlamaForCausalLM", "m", "p", None, source=read_source_card(tmp_path)))
    assert 'license: "other"' in text and 'license_link: "LICENSE"' in text and "that of the base: LICENSE" in text


def test_the_head_of_a_gguf_file_says_the_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Field:
        def __init__(self, value: object) -> None:
            self.value = value

        def contents(self) -> object:
            return self.value

    url = "https://huggingface.co/owner/model"
    fields = {"license": "apache-2.0", "languages": ["en", "x y"], "repo_url": url, "license.link": "file:///etc"}

    class Reader:
        def __init__(self, file: str) -> None:
            self.fields = {f"general.{name}": Field(value) for name, value in fields.items()}

    module: Any = type("gguf", (), {"GGUFReader": Reader})
    monkeypatch.setattr(source_card.importlib, "import_module", lambda name: module)
    folder(tmp_path, card_of_gguf(tmp_path / "x.gguf"))
    assert read_source_card(tmp_path) == SourceCard("apache-2.0", base="owner/model", languages=("en",))


def test_a_hub_reads_the_card() -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = SourceCard("apache-2.0", base="owner/model", languages=("en",))
    where = "3 windows of 5 tokens of a b.txt"
    card = Card('näme: "x" 😀', "LlamaForCausalLM", "admm", "2:4", 0.5, "8 windows", (where, 20.0, 30.5), source)
    card = replace(card, numbers={"speed": "1 | 2"}, texts={"Said": "# a <b>\n---\n"}, command="prunella llm x")
    text = render_card(card)
    data = hub.ModelCard(text).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", "owner/model", "text-generation")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 30.5, "a b.txt")
    body = text.split("---", 2)[2]
    assert "| speed | 1 &#124; 2 |" in body and "> &#35; a &lt;b&gt;  " in body and "\n---" not in body


def test_a_smaller_model_has_no_sparsity_and_its_own_reader() -> None:
    text = render_card(Card("x", "LlamaForCausalLM", "m", "depth", None, plain=False))
    assert 'library_name: "prunella"' in text and "pr.load(" in text and "sparsity" not in text
