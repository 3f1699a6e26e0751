"""A folder with a model, data and measures, as a user of the command line has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prunella.cli import main
from tests.llm.streaming.models import write

MODULE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )


def loader():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(3)]


def endless_once():
    yield from loader()


def empty():
    return []


def number():
    return 3


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def kept_filters(model):
    return model[0].out_channels / 8


def broken():
    raise ValueError("no weights in sight")


def interrupted():
    raise KeyboardInterrupt


def hungry():
    raise MemoryError("8 TiB")
"""


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the user's module; the current folder is the one that holds it."""
    monkeypatch.chdir(tmp_path)
    name = f"shop_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


@pytest.fixture
def prunella(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process."""
    monkeypatch.delenv("PRUNELLA_DEBUG", raising=False)

    def run(*words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capfd.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


WORDS = "the cat sat on a mat and saw that fat rat run at bat hat pat vat".split()


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with a tokenizer of words in `in`, and a text of 170 words."""
    monkeypatch.chdir(tmp_path)
    model = write(tmp_path / "in")
    with_words(Path("in"))
    Path("text.txt").write_text(" ".join(WORDS * 10))
    return model


def with_words(folder: Path) -> None:
    """A tokenizer of words in a folder."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate([*WORDS, "?"])}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
