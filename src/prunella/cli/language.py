"""`run` on a language model: a text file in, block by block, a Hugging Face folder out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunella.cli.console import emit, note, stage

if TYPE_CHECKING:
    from prunella.blockwise import OneShot
    from prunella.streaming import Step, Streamed

RECIPES = ("one_shot", "admm", "sparsegpt")
"""Names of `prunella.streaming.preset`, known without importing torch."""


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
    from prunella.streaming import forecast as foresee

    folder, how, data = _read(asked)
    with stage("trying the first block on two batches"):
        found = foresee(folder, how, data=data, memory=asked.memory, skip=asked.skip)
    said = {**asdict(found), "peak": {**found.peak.parts, "together": found.peak.bytes}}
    emit({**said, "stream_on_disk": found.peak.on_disk}, str(found), as_json=as_json)


def run(asked: Asked, output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Prune, and print what was done."""
    from prunella.streaming import solve_folder

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
    from prunella.streaming.convertible import gguf_obstacle

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
    from prunella.cli.request import load_data, read_pattern
    from prunella.errors import RequestError
    from prunella.granularity import NM, Element
    from prunella.models import model_folder
    from prunella.streaming.preset import PRESETS
    from prunella.streaming.text import text_windows

    pattern = read_pattern(asked.pattern) if asked.pattern else Element()
    if isinstance(pattern, NM) and asked.sparsity not in (None, pattern.sparsity):
        why = f"{asked.pattern} removes {pattern.sparsity:g} of every layer"
        raise RequestError(f"--sparsity {asked.sparsity:g} and --pattern {asked.pattern}", why, "leave one of them out")
    if asked.data is None:
        raise RequestError("there is no calibration data", "layers are solved for their inputs", "give --data FILE.txt")
    how = PRESETS[asked.recipe](pattern, 0.5 if asked.sparsity is None else asked.sparsity)
    folder = model_folder(asked.model)
    if not folder.is_dir():
        why = "it is not a folder, a FILE.gguf or smollm2"
        raise RequestError(f"cannot prune {asked.model} block by block", why, "give a Hugging Face folder")
    if Path(asked.data).is_file():
        count = 128 if asked.windows is None else asked.windows
        length = 512 if asked.length is None else asked.length
        return folder, how, text_windows(folder, asked.data, count=count, length=length, seed=asked.seed)
    if ":" not in asked.data:
        raise RequestError(f"there is no text file {asked.data}", "", "give --data FILE.txt, or --data module:function")
    if asked.windows is not None or asked.length is not None:
        raise RequestError("--windows and --length are of a text file", f"{asked.data} is none", "give --data FILE.txt")
    return folder, how, list(load_data(asked.data) or ())
