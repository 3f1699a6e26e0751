"""`run` and `compare` on a language model: a text file in, block by block, a Hugging Face folder or a table out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunella.cli.console import emit, note, stage
from prunella.model.copying import copied

if TYPE_CHECKING:
    from torch import nn

    from prunella.experiments.comparison import Compared
    from prunella.llm import OneShot
    from prunella.llm.streaming import Step, Streamed

RECIPES = ("one_shot", "admm", "alps", "sparsegpt")
"""Names of `prunella.llm.presets`, known without importing torch."""
SCORES = ("wanda", "ria", "magnitude")
"""Names of it that are criteria as well: `run` takes them block by block where the data is a text file."""


def asked_for(recipe: str, data: str | None) -> bool:
    """Whether `run` means a language model, block by block."""
    return recipe in RECIPES or (recipe in SCORES and data is not None and Path(data).is_file())


@dataclass(frozen=True)
class Asked:
    """What the command line says. data: a text file, or module:function of batches."""

    model: str
    recipe: str
    data: str | None
    sparsity: float | None
    pattern: str | None
    memory: str | None
    windows: int | None
    length: int | None
    skip: tuple[str, ...]
    seed: int


def forecast(asked: Asked, *, as_json: bool) -> None:
    """Print what a run would take."""
    from prunella.llm.streaming import forecast as foresee

    folder, how, data = _read(asked)
    with stage("trying the first block on two batches"):
        found = foresee(folder, how, data=data, memory=asked.memory, skip=asked.skip)
    said = {**asdict(found), "peak": {**found.peak.parts, "together": found.peak.bytes}}
    emit({**said, "stream_on_disk": found.peak.on_disk}, str(found), as_json=as_json)


def run(asked: Asked, output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Prune, and print what was done."""
    from prunella.llm.streaming import solve_folder

    with _joined() as speaks:
        folder, how, data = _read(asked)
        if speaks:
            note(f"{len(data)} batches; a run that is killed goes on when it is started again")
        done = solve_folder(
            folder, output, how, data=data, memory=asked.memory, skip=asked.skip, overwrite=overwrite,
            on_block=_told() if speaks else None,
        )  # fmt: skip
    if speaks:
        _said(done, as_json=as_json)


def _said(done: Streamed, *, as_json: bool) -> None:
    from prunella.llm.streaming.gguf import gguf_obstacle

    obstacle = gguf_obstacle(done.path)
    gguf = f"not for converters to GGUF: {obstacle}" if obstacle else "its shapes and files suit converters to GGUF"
    text = f"{done}\nread it with from_pretrained; {gguf}"
    result = {
        "folder": str(done.path), "sparsity": done.solving.sparsity, "seconds": done.seconds,
        "replayed": done.replayed, "predicted_bytes": done.peak.bytes, "most_bytes": done.most,
        "reader": "from_pretrained", "gguf_obstacle": obstacle, "layers": [asdict(fit) for fit in done.solving.fits],
    }  # fmt: skip
    emit(result, text, as_json=as_json)


@contextmanager
def _joined() -> Iterator[bool]:
    """Under torchrun, with the other processes; whether this is the one that speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _told() -> Callable[[Step], None]:
    """A line for each block, with what is left by the mean of those that were solved."""
    seconds: list[float] = []

    def tell(step: Step) -> None:
        if not step.replayed:
            seconds.append(step.seconds)
        left = sum(seconds) / len(seconds) * (step.count - step.number) if seconds else 0.0
        note(f"{step}; about {left:.0f} s left" if left else str(step))

    return tell


def _read(asked: Asked) -> tuple[Path, OneShot, list[Any]]:
    """The folder, the recipe and the batches."""
    from prunella.cli.parse import load_data
    from prunella.errors import RequestError
    from prunella.llm.text import text_samples

    how = recipe_of(asked.recipe, asked.pattern, asked.sparsity)
    if asked.data is None:
        raise RequestError("there is no calibration data", "layers are solved for their inputs", "give --data FILE.txt")
    folder = folder_of(asked.model)
    if Path(asked.data).is_file():
        count = 128 if asked.windows is None else asked.windows
        length = 512 if asked.length is None else asked.length
        return folder, how, text_samples(folder, asked.data, nsamples=count, seqlen=length, seed=asked.seed)
    if ":" not in asked.data:
        raise RequestError(f"there is no text file {asked.data}", "", "give --data FILE.txt, or --data module:function")
    if asked.windows is not None or asked.length is not None:
        raise RequestError("--windows and --length are of a text file", f"{asked.data} is none", "give --data FILE.txt")
    return folder, how, list(load_data(asked.data) or ())


@dataclass(frozen=True)
class Protocol:
    """What all rows of a comparison share. data, text: files; the numbers of windows and the tokens in each."""

    data: str
    text: str
    windows: int
    length: int
    judged: int
    window: int
    skip: tuple[str, ...]


def compare(
    folder: Path, recipes: Mapping[str, OneShot], protocol: Protocol, seeds: int, output: Path
) -> tuple[Compared, str]:
    """The table, and a sentence on how its numbers were made."""
    from prunella import metrics
    from prunella.errors import RequestError
    from prunella.experiments import comparison
    from prunella.io.load import load_model
    from prunella.llm import solve_
    from prunella.llm.text import text_samples, text_tokens
    from prunella.registry.serialize import described

    if min(seeds, protocol.judged) < 1:
        raise RequestError(f"{seeds} seeds on {protocol.judged} windows compare nothing", "at least 1 of each", "")
    dense, tokens, window = load_model(str(folder)), text_tokens(folder, protocol.text), protocol.window
    count = min(protocol.judged, len(tokens) // window)
    few = [{"input_ids": tokens[k * window :][:window][None]} for k in range(-(-count // 4))]

    def perplexity(model: nn.Module) -> float:
        return metrics.perplexity(model, tokens, window=window, limit=protocol.judged).value

    def agreement(model: nn.Module) -> tuple[float, float]:
        found = metrics.token_agreement(dense, model, few)
        return found.kl, found.top1

    def way(name: str, seed: int) -> nn.Module:
        nsamples, seqlen = protocol.windows, protocol.length
        batches = text_samples(folder, protocol.data, nsamples=nsamples, seqlen=seqlen, seed=seed)
        model = copied(dense)
        with stage(f"{name}, seed {seed}"):
            solve_(model, batches[0], recipes[name], data=batches, skip=protocol.skip)
        return model

    files = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (protocol.data, protocol.text)]
    asked = [asdict(protocol), files, {name: described(how) for name, how in recipes.items()}]
    ways = {name: partial(way, name) for name in recipes}
    measures: comparison.Measures = {"perplexity": perplexity, ("KL", "top-1"): agreement}
    found = comparison.compare(dense, ways, measures, seeds=range(seeds), folder=output, asked=asked)
    return found, (
        f"judged on {count} windows of {window} tokens of {protocol.text} without overlap, {len(few)} of them for "
        f"KL (in nats) and top-1; calibrated on {protocol.windows} windows of {protocol.length} of {protocol.data}"
    )


def recipe_of(name: str, pattern: str | None, sparsity: float | None) -> OneShot:
    """A preset at what the command line asks for; half of the weights if it says nothing."""
    from prunella.cli.parse import read_pattern
    from prunella.errors import RequestError
    from prunella.granularity import NM, Element
    from prunella.llm.presets import PRESETS

    if name not in PRESETS:
        raise RequestError(f"there is no recipe {name!r} for language models", "", f"one of {', '.join(PRESETS)}")
    read = read_pattern(pattern) if pattern else Element()
    if isinstance(read, NM) and sparsity not in (None, read.sparsity):
        why = f"{pattern} removes {read.sparsity:g} of every layer"
        raise RequestError(f"--sparsity {sparsity:g} and --pattern {pattern}", why, "leave one of them out")
    return PRESETS[name](read, 0.5 if sparsity is None else sparsity)


def folder_of(model: str) -> Path:
    """The Hugging Face folder of a model."""
    from prunella.errors import RequestError
    from prunella.io.load import model_folder

    folder = model_folder(model)
    if not folder.is_dir():
        why = "it is not a folder, a FILE.gguf or smollm2"
        raise RequestError(f"cannot prune {model} block by block", why, "give a Hugging Face folder")
    return folder
