"""What a line of `prunella llm` asks for: zeros or units, recovery, text; and what all of its ways share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import note
from prunella.cli.texts import Judging, Text, judged_by

if TYPE_CHECKING:
    from prunella.app.language_job import LanguageModel
    from prunella.llm import OneShot
    from prunella.llm.streaming import BlockStep


@dataclass(frozen=True)
class Zeros:
    """The weights to remove."""

    recipe: options.LLMRecipeName = None
    sparsity: options.LayerSparsity = None
    pattern: options.Pattern = None
    skip: options.Skip = None
    bits: Annotated[int | None, typer.Option("--bits", help="Round the weights too: 8 or 4 bits, sign included.")] = (
        None
    )


@dataclass(frozen=True)
class Structure:
    """Which units go, and how the model is recovered."""

    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            metavar="G",
            help="A smaller model: depth, channel (neurons), head, width, expert or vocabulary; comma-separated.",
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="T", help="Budget to keep: params=0.8 (the default), macs=0.7."),
    ] = None
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="match (the residual stream), lora:STEPS, distill:STEPS or none; comma-separated.",
        ),
    ] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate of lora (1e-3) and of distill (1e-4).")] = None


@dataclass(frozen=True)
class LLMRequest:
    """What the line asks for."""

    model: str
    zeros: Zeros
    structure: Structure
    text: Text
    judging: Judging
    memory: str | None

    @property
    def units(self) -> tuple[str, ...]:
        """The names in `--granularity`."""
        words = (self.structure.granularity or "").split(",")
        return tuple(word.strip().lower() for word in words if word.strip())

    @property
    def in_memory(self) -> bool:
        """Whether the models are in memory whole: to cut units, or to recover."""
        return bool(self.structure.granularity or self.structure.recover not in (None, "", "none"))

    def check(self) -> None:
        """Errors: RequestError for what does not go together."""
        from prunella.errors import RequestError

        zeros, structure = self.zeros, self.structure
        units = {"--sparsity": zeros.sparsity is not None, "--pattern": zeros.pattern}
        said = next((name for name, value in units.items() if value), None)
        if structure.granularity and said:
            why = f"{said} asks for zeros in a model of the same shapes"
            raise RequestError(f"--granularity does not go with {said}", why, "give --target, or no --granularity")
        if structure.target is not None and not structure.granularity:
            why = "a target is for units that are removed; zeros have a --sparsity or a --pattern"
            raise RequestError(
                "--target needs --granularity", why, "for example --granularity depth --target params=0.8"
            )


def source_of(request: LLMRequest, folder: Path, data: Any, model: Any = None) -> LanguageModel:
    from prunella.app.language_job import LanguageModel
    from prunella.cli.run import named as without_places

    held_out = judged_by(folder, request.judging, data, request.text.seed, model)
    if model is not None and held_out is not None:
        held_out = _judges(model, held_out)
    command = shlex.join(["prunella", *map(without_places, sys.argv[1:])])
    name = request.model if not Path(request.model).exists() else folder.name
    return LanguageModel(folder, name, held_out, _calibrated(data), command)


def _judges(model: Any, held_out: Any) -> Any:
    """The text, or None with a note if the model is none that a text can judge."""
    from prunella.app.language import check_left_to_right
    from prunella.errors import NotSupported

    try:
        check_left_to_right(model, held_out.tokens[:1])
    except NotSupported as error:
        note(f"nothing is judged at the end: {error.what}, {error.why}")
        return None
    return held_out


def _calibrated(data: Any) -> str:
    return f"{len(data)} batches" if isinstance(data, list) else str(data)


def teller() -> Callable[[BlockStep], None]:
    """Prints a line for each block, with the time left, estimated from the mean of the solved blocks."""
    seconds: list[float] = []

    def tell(step: BlockStep) -> None:
        if not step.replayed:
            seconds.append(step.seconds)
        left = sum(seconds) / len(seconds) * (step.count - step.number) if seconds else 0.0
        note(f"{step}; about {left:.0f} s left" if left else str(step))

    return tell


def llm_recipe(name: str | None, pattern: str | None, sparsity: float | None, *, bits: int | None = None) -> OneShot:
    """A preset at what the command line asks for; half of the weights if it says nothing, none if only bits are said.

    bits: the kept weights are rounded while the layer is solved.
    """
    from functools import partial

    from prunella.cli.parse import read_pattern
    from prunella.errors import RequestError, near_names
    from prunella.granularity import NM, Element
    from prunella.llm import OneShot
    from prunella.llm.presets import PRESETS
    from prunella.solvers import Grid, prune_and_quantize

    if name is not None and name not in PRESETS:
        why = near_names(name, PRESETS)
        raise RequestError(f"there is no recipe {name!r} for language models", why, f"one of {', '.join(PRESETS)}")
    zeros = read_pattern(pattern) if pattern else Element()
    if isinstance(zeros, NM) and sparsity not in (None, zeros.sparsity):
        why = f"{pattern} removes {zeros.sparsity:g} of every layer"
        raise RequestError(f"--sparsity {sparsity:g} and --pattern {pattern}", why, "leave one of them out")
    if bits is None:
        return PRESETS[name or "one_shot"](zeros, 0.5 if sparsity is None else sparsity)
    if name not in (None, "sparsegpt"):
        why = "weights are pruned and rounded in one pass over the columns, as sparsegpt prunes them"
        raise RequestError(f"--bits does not go with --recipe {name}", why, "leave --recipe out")
    share = sparsity if sparsity is not None else 0.5 if pattern else 0.0
    return OneShot(zeros, share, partial(prune_and_quantize, grid=Grid(bits)))


def folder_of(model: str) -> Path:
    """The Hugging Face folder of a model."""
    from prunella.errors import RequestError
    from prunella.io.kind_of_path import described_path
    from prunella.io.load import model_folder

    folder = model_folder(model)
    if not folder.is_dir():
        todo = "give a Hugging Face folder, FILE.gguf or smollm2"
        raise RequestError(f"{model} is not a language model that can be read", described_path(model), todo)
    return folder
