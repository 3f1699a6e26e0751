"""The text of a language model on the command line: what calibrates it, what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from prunella.cli import options
from prunella.cli.console import note

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunella.app.language import HeldOut
    from prunella.llm import Calibration

NSAMPLES, SEQLEN = 128, 512
EVAL_SAMPLES, EVAL_SEQLEN = 8, 512


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
        int | None, typer.Option("--nsamples", help=f"Windows of text to calibrate with ({NSAMPLES}).")
    ] = None
    seqlen: Annotated[int | None, typer.Option("--seqlen", help=f"Tokens in a window ({SEQLEN}).")] = None
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
class Judging:
    """How both models are judged at the end."""

    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Text to judge by. Default: what --data has left."),
    ] = None
    eval_samples: Annotated[int, typer.Option("--eval-samples", help="Most windows of it; 0 judges nothing.")] = (
        EVAL_SAMPLES
    )
    eval_seqlen: Annotated[int, typer.Option("--eval-seqlen", help="Most tokens in one of them.")] = EVAL_SEQLEN


def named(data: Calibration | list[Any], text: Text) -> str:
    """The description of the calibration data for the first line of a run."""
    if isinstance(data, list):
        return f"{len(data)} batches"
    return f"{'' if text.data else 'no --data, so the model writes its own text: '}{data}"


def calibration_of(text: Text) -> Calibration | list[Any]:
    """The batches of a function, or the texts that they are drawn from."""
    from prunella.cli.parse import load_data
    from prunella.errors import RequestError

    if not _is_function(text.data):
        return _calibration(text)
    if text.nsamples is not None or text.seqlen is not None:
        why = f"{text.data[0]} gives batches of its own"
        raise RequestError("--nsamples and --seqlen apply to a text", why, "leave them out, or give --data FILE.txt")
    return list(load_data(text.data[0]) or ())


def not_fitted(folder: Path, text: Text) -> list[dict[str, Tensor]]:
    """Windows of the held-out text, an eighth of the number of calibration windows."""
    from prunella.llm.text import text_samples

    if text.held_out is None:
        return []
    count = max(1, (text.nsamples or NSAMPLES) // 8)
    return text_samples(folder, text.held_out, nsamples=count, seqlen=text.seqlen or SEQLEN, seed=text.seed)


def judged_by(
    folder: Path, judging: Judging, data: Calibration | list[Any], seed: int, model: nn.Module | None = None
) -> HeldOut | None:
    """The text that both models are judged by; None if nothing is to be judged.

    model: writes that text itself where no file has any; None reads it for that.
    """
    from prunella.app.language import held_out_by, held_out_file, held_out_of
    from prunella.io.load import load_model

    samples, seqlen = judging.eval_samples, judging.eval_seqlen
    if samples < 1:
        return None
    if judging.text is not None:
        return held_out_file(folder, judging.text, samples=samples, seqlen=seqlen)
    left = None if isinstance(data, list) else held_out_of(folder, data, samples=samples, seqlen=seqlen)
    if left is not None:
        if left.note:
            note(left.note)
        return left
    length = min(seqlen, SEQLEN if isinstance(data, list) else data.seqlen)
    dense = load_model(str(folder)) if model is None else model
    return held_out_by(dense, samples=samples, seqlen=length, seed=seed)


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
    given = [share for share in shares.values() if share is not None]
    if len(shares) < len(pairs) or len(given) not in (0, len(shares)):
        why = "a text is given twice" if len(shares) < len(pairs) else "some texts have a share and others have none"
        raise RequestError("the texts cannot be mixed", why, "for example --data auto:0.5 --data c4.txt:0.5")
    nsamples = NSAMPLES if text.nsamples is None else text.nsamples
    seqlen = SEQLEN if text.seqlen is None else text.seqlen
    sources = {name: 1.0 if share is None else share for name, share in shares.items()}
    return Calibration(sources, nsamples, seqlen, text.seed, _written)


def _written(count: int, all_windows: int) -> None:
    note(f"the model has written {count} of {all_windows} windows of its own text")


def shared_source(text: str) -> tuple[str, float | None]:
    """Split `c4.txt:0.5` into name and share; the share of a bare name is None."""
    name, colon, share = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, None
    try:
        return name, float(share)
    except ValueError:
        return text, None
