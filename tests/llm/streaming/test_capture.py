"""Blocks in other orders are refused; folders for other readers; cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.io.card import render_card
from prunella.llm.blocks import listed_block_paths
from prunella.llm.streaming.capture import capture
from prunella.llm.streaming.gguf import gguf_obstacle
from prunella.llm.streaming.shards import write_shard
from prunella.model.forward import forward


class Part(nn.Module):
    """A block of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, device="meta")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        return x + self.layer(x), "and more"


class Net(nn.Module):
    """Three blocks, run in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.blocks, self.order, self.seen = nn.ModuleList(Part() for _ in range(3)), order, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        mask = torch.ones(2) * (1 if self.order == "same" else self.seen)
        for k in {"same": "012", "other": "012", "twice": "0122", "back": "021", "scaled": "012"}[self.order]:
            x = self.blocks[int(k)](x, mask=mask)[0]
            x = x * 2 if self.order == "scaled" else x
        return x


class Bare:
    """A skeleton that has nothing to load."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_demand(self, paths: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()


def captured(order: str) -> Any:
    bare: Any = Bare(Net(order))
    return capture(bare, [torch.full((1, 4), float(k)) for k in range(3)], forward, list)


def test_hidden_states_are_kept_and_shared_arguments_once() -> None:
    same, other = captured("same"), captured("other")
    assert [float(first[0, 0]) for first in same.hidden_states] == [0, 1, 2]
    assert [block.path for block in same.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert same.constants == 8 and other.constants == 3 * 8
    assert [float(call.kwargs["mask"][0]) for call in other.arguments["blocks.1"]] == [1, 2, 3]
    assert "forward" not in vars(Net("same").blocks[0])


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("twice", "runs again after the last one"),
        ("back", "do not run one after the other"),
        ("scaled", "is not fed by the block"),
    ],
)
def test_blocks_in_another_order_are_refused(order: str, said: str) -> None:
    with pytest.raises(NotSupported) as refused:
        captured(order)
    assert said in str(refused.value)


def test_a_model_without_a_list_of_blocks() -> None:
    with pytest.raises(NotSupported, match="no list of blocks"):
        listed_block_paths(nn.Linear(2, 2))


def folder(place: Path, **changes: Any) -> Path:
    place.mkdir()
    tensors = {f"model.layers.{k}.up.weight": torch.zeros(6, 4) for k in range(2)} | {"head.weight": torch.zeros(3, 4)}
    write_shard(place / "model.safetensors", tensors | changes)
    (place / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (place / "tokenizer.json").write_text("{}")
    return place


def test_what_converters_ask_for(tmp_path: Path) -> None:
    assert gguf_obstacle(folder(tmp_path / "a")) == ""
    ragged = {"model.layers.1.up.weight": torch.zeros(5, 4)}
    assert "(5, 4) and model.layers.0.up.weight is (6, 4)" in gguf_obstacle(folder(tmp_path / "b", **ragged))
    assert "int8" in gguf_obstacle(folder(tmp_path / "c", extra=torch.zeros(2, dtype=torch.int8)))
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert gguf_obstacle(tmp_path / "a") == "it has no tokenizer"
    (tmp_path / "a" / "config.json").unlink()
    assert gguf_obstacle(tmp_path / "a") == "config.json names no architecture"


def test_a_card_quotes_what_it_is_given() -> None:
    name = 'evil"\nlicense: mit\n<script>alert(1)</script>'
    text = render_card(
        pr.io.Card(name, "LlamaForCausalLM", "admm", "NM(n=2, m=4)", 0.5, "8 windows", ("text", 20.0, 30.5))
    )
    assert "\nlicense" not in text and "<script>" not in text.split("---")[2]
    assert "| perplexity on text | 20 dense, 30.5 pruned |" in text and "| calibration | 8 windows |" in text
    plain = render_card(pr.io.Card("x", "LlamaForCausalLM", "admm", "NM(n=2, m=4)", 0.5))
    assert "perplexity" not in plain and "calibration" not in plain


def test_samples_of_a_text_are_drawn_with_a_seed(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    from prunella.llm.text import text_samples

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(k): k for k in range(50)}, "0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(50))))
    found = text_samples(tmp_path, text, nsamples=40, seqlen=48, seed=3)
    starts = {int(batch["input_ids"][0, 0]) for batch in found}
    assert starts == {0, 1, 2}  # every place is possible, the last one too
    assert all(b["input_ids"][0].tolist() == list(range(int(b["input_ids"][0, 0]), 48 + int(b["input_ids"][0, 0])))
               for b in found)  # fmt: skip
    again = text_samples(tmp_path, text, nsamples=40, seqlen=48, seed=3)
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(found, again, strict=True))
    with pytest.raises(RequestError, match="has 50 tokens, and a sample has 51"):
        text_samples(tmp_path, text, seqlen=51)
    with pytest.raises(RequestError, match="are not data"):
        text_samples(tmp_path, text, nsamples=0)
