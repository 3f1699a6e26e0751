"""The verb that prunes a language model block by block: a text file in, a Hugging Face folder out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage

if TYPE_CHECKING:
    from torch import Tensor

    from prunella.llm import Calibration, OneShot
    from prunella.llm.streaming import BlockStep, Streamed

_NSAMPLES, _SEQLEN = 128, 512


@dataclass(frozen=True)
class Text:
    """The calibration data of a language model. nsamples and seqlen apply to text files, not to given batches."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A text file, auto (text that the model writes itself, the default), or module:function that returns "
            "batches. Several mix: --data auto:0.5 --data c4.txt:0.5.",
        ),
    ] = None
    nsamples: Annotated[
        int | None, typer.Option("--nsamples", help=f"Windows of text to calibrate with ({_NSAMPLES}).")
    ] = None
    seqlen: Annotated[int | None, typer.Option("--seqlen", help=f"Tokens in a window ({_SEQLEN}).")] = None
    seed: options.Seed = 0
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="Text of another source: nothing is fitted to it, and new weights go only so far as serves it too.",
        ),
    ] = None


@dataclass(frozen=True)
class Zeros:
    """The weights to remove."""

    recipe: options.LLMRecipeName = "one_shot"
    sparsity: options.LayerSparsity = None
    pattern: options.Pattern = None
    skip: options.Skip = None


def llm(
    model: options.LLMModel,
    zeros: Zeros,
    text: Text,
    memory: Annotated[str | None, typer.Option(metavar="4GB", help="Most memory of the process.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory and time, and write nothing.")] = False,
    output: options.Output = Path("pruned"),
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Prune a language model in one shot, block by block, in the memory of one block; no training.

    Plain from_pretrained reads the result. The same command resumes a killed run.
    """
    from prunella.io.space import check_apart, check_writable
    from prunella.llm.calibration import Split
    from prunella.llm.streaming import solve_folder

    if dry_run:
        _forecast(model, zeros, text, memory, as_json=as_json)
        return
    check_apart(output, model, text.held_out, *(shared_source(source)[0] for source in text.data or ()))
    check_writable(output)
    with _joined() as speaks:
        folder, recipe, data = _read(model, zeros, text)
        if speaks:
            note(f"{_named(data, text)}; the same command resumes a killed run")
        streamed = solve_folder(
            folder, output, recipe, data=Split(data, _held_out(folder, text)), memory=memory,
            skip=tuple(zeros.skip or ()), overwrite=overwrite,
            on_block=_told() if speaks else None,
        )  # fmt: skip
    if speaks:
        _say(streamed, as_json=as_json)


def _forecast(model: str, zeros: Zeros, text: Text, memory: str | None, *, as_json: bool) -> None:
    """Print the memory and time that a run would take."""
    from prunella.llm.streaming import forecast

    folder, recipe, data = _read(model, zeros, text)
    with stage("trying the first block on two batches"):
        expected = forecast(folder, recipe, data=data, memory=memory, skip=tuple(zeros.skip or ()))
    peak = {**expected.peak.parts, "together": expected.peak.bytes}
    result = {**asdict(expected), "peak": peak, "stream_on_disk": expected.peak.on_disk}
    emit(result, str(expected), as_json=as_json)


def _say(done: Streamed, *, as_json: bool) -> None:
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
    """Join the other processes under torchrun; yields whether this process prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _told() -> Callable[[BlockStep], None]:
    """Prints a line for each block, with the time left, estimated from the mean of the solved blocks."""
    seconds: list[float] = []

    def tell(step: BlockStep) -> None:
        if not step.replayed:
            seconds.append(step.seconds)
        left = sum(seconds) / len(seconds) * (step.count - step.number) if seconds else 0.0
        note(f"{step}; about {left:.0f} s left" if left else str(step))

    return tell


def _written(count: int, all_windows: int) -> None:
    note(f"the model has written {count} of {all_windows} windows of its own text")


def _named(data: Calibration | list[Any], text: Text) -> str:
    """The description of the calibration data for the first line of a run."""
    if isinstance(data, list):
        return f"{len(data)} batches"
    return f"{'' if text.data else 'no --data, so the model writes its own text: '}{data}"


def _read(model: str, zeros: Zeros, text: Text) -> tuple[Path, OneShot, Calibration | list[Any]]:
    """The folder, the recipe, and the batches or the texts from which they are drawn."""
    from prunella.cli.parse import load_data
    from prunella.errors import RequestError

    recipe, folder = llm_recipe(zeros.recipe, zeros.pattern, zeros.sparsity), folder_of(model)
    if not _is_function(text.data):
        return folder, recipe, _calibration(text)
    if text.nsamples is not None or text.seqlen is not None:
        why = f"{text.data[0]} gives batches of its own"
        raise RequestError("--nsamples and --seqlen apply to a text", why, "leave them out, or give --data FILE.txt")
    return folder, recipe, list(load_data(text.data[0]) or ())


def _held_out(folder: Path, text: Text) -> list[dict[str, Tensor]]:
    """Windows of the held-out text, an eighth of the number of calibration windows."""
    from prunella.llm.text import text_samples

    if text.held_out is None:
        return []
    count = max(1, (text.nsamples or _NSAMPLES) // 8)
    return text_samples(folder, text.held_out, nsamples=count, seqlen=text.seqlen or _SEQLEN, seed=text.seed)


def _is_function(data: list[str] | None) -> TypeGuard[list[str]]:
    """Whether the only source is module:function, not a text with its share."""
    if data is None or len(data) != 1 or Path(data[0]).is_file():
        return False
    name, share = shared_source(data[0])
    return share is None and ":" in name


def _calibration(text: Text) -> Calibration:
    """The texts with their shares, which must be given for all texts or for none."""
    from prunella.errors import RequestError
    from prunella.llm.calibration import AUTO, Calibration

    pairs = [shared_source(source) for source in text.data or [AUTO]]
    shares = dict(pairs)
    for name in shares:
        if name != AUTO and not Path(name).is_file():
            todo = "give --data FILE.txt, --data auto, or --data module:function alone"
            raise RequestError(f"there is no text file {name}", "", todo)
    shares_given = [share for share in shares.values() if share is not None]
    if len(shares) < len(pairs) or len(shares_given) not in (0, len(shares)):
        why = "a text is given twice" if len(shares) < len(pairs) else "some texts have a share and others have none"
        raise RequestError("the texts cannot be mixed", why, "for example --data auto:0.5 --data c4.txt:0.5")
    nsamples = _NSAMPLES if text.nsamples is None else text.nsamples
    seqlen = _SEQLEN if text.seqlen is None else text.seqlen
    sources = {name: 1.0 if share is None else share for name, share in shares.items()}
    return Calibration(sources, nsamples, seqlen, text.seed, _written)


def shared_source(text: str) -> tuple[str, float | None]:
    """Split `c4.txt:0.5` into name and share; the share of a bare name is None."""
    name, colon, share = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, None
    try:
        return name, float(share)
    except ValueError:
        return text, None


def llm_recipe(name: str, pattern: str | None, sparsity: float | None) -> OneShot:
    """A preset with the sparsity of the command line; default: half of the weights."""
    from prunella.cli.parse import read_pattern
    from prunella.errors import RequestError, near_names
    from prunella.granularity import NM, Element
    from prunella.llm.presets import PRESETS

    if name not in PRESETS:
        why = near_names(name, PRESETS)
        raise RequestError(f"there is no recipe {name!r} for language models", why, f"one of {', '.join(PRESETS)}")
    zeros = read_pattern(pattern) if pattern else Element()
    if isinstance(zeros, NM) and sparsity not in (None, zeros.sparsity):
        why = f"{pattern} removes {zeros.sparsity:g} of every layer"
        raise RequestError(f"--sparsity {sparsity:g} and --pattern {pattern}", why, "leave one of them out")
    return PRESETS[name](zeros, 0.5 if sparsity is None else sparsity)


def folder_of(model: str) -> Path:
    """The Hugging Face folder of a model."""
    from prunella.errors import RequestError
    from prunella.io.kind_of_path import described_path
    from prunella.io.load import model_folder

    folder = model_folder(model)
    if not folder.is_dir():
        todo = "give a Hugging Face folder, FILE.gguf or smollm2"
        raise RequestError(f"cannot prune {model} block by block", described_path(model), todo)
    return folder
