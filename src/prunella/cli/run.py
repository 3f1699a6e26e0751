"""The verb that does the whole job: on a network with a plan, on a language model block by block."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import emit, note

if TYPE_CHECKING:
    from torch import nn

    from prunella.app.run import Job
    from prunella.types import Inputs


def run(
    model: options.Model,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME", help="A recipe or criterion; one_shot for language models.")
    ] = "magnitude",
    target: options.TargetText = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    allow_pickle: options.AllowPickle = False,
    granularity: options.GranularityText = None,
    allocation: options.AllocationName = None,
    pattern: options.Pattern = None,
    min_density: options.MinDensity = None,
    round_to: options.RoundTo = None,
    equal_widths: options.EqualWidths = False,
    skip: options.Skip = None,
    only: options.Only = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="module:function of batches; a text file for one_shot.")
    ] = None,
    loss: options.LossName = None,
    sparsity: Annotated[float | None, typer.Option(help="one_shot: fraction removed from every layer.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="4GB", help="one_shot: most memory of the process.")] = None,
    windows: Annotated[int | None, typer.Option(help="one_shot: windows of text (128).")] = None,
    length: Annotated[int | None, typer.Option(help="one_shot: tokens in a window (512).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="one_shot: memory and time, and nothing else.")] = False,
    heal: Annotated[
        str, typer.Option(metavar="H", help="bn, reconstruct, distill:STEPS, finetune:STEPS; by comma.")
    ] = "",
    lr: Annotated[float, typer.Option(help="Learning rate of distill and finetune.")] = 1e-4,
    metric: Annotated[
        str | None, typer.Option(metavar="M:F", help="module:function of (model); higher is better.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Write nothing if --metric falls by more.")] = None,
    program: options.Program = False,
    seed: options.Seed = 0,
    output: options.Output = Path("pruned"),
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Plan, cut, heal, check, measure; write the smaller model and report.html to a folder.

    With --recipe one_shot, prune a language model block by block, in the memory of one block, into a folder that plain
    from_pretrained reads; a run that was killed goes on when it is started again.
    """
    from prunella.cli import llm as language

    if language.asked_for(recipe, data):
        _refuse(f"--recipe {recipe}", {
            "--target": target, "--inputs": inputs, "--weights": weights, "--allow-pickle": allow_pickle,
            "--granularity": granularity, "--allocation": allocation, "--min-density": min_density,
            "--round-to": round_to, "--equal-widths": equal_widths, "--only": only, "--loss": loss, "--heal": heal,
            "--metric": metric, "--max-drop": max_drop, "--program": program,
        })  # fmt: skip
        asked = language.Asked(model, recipe, data, sparsity, pattern, memory, windows, length, tuple(skip or ()), seed)
        if dry_run:
            language.forecast(asked, as_json=as_json)
        else:
            language.run(asked, output, overwrite=overwrite, as_json=as_json)
        return
    of_text = {"--sparsity": sparsity, "--memory": memory, "--windows": windows, "--length": length}
    _refuse(f"--recipe {recipe}", {**of_text, "--dry-run": dry_run})
    from prunella.app.run import Job, read_heal
    from prunella.cli import parse as request
    from prunella.io.files import check_free

    check_free(output, overwrite=overwrite)
    parts = request.build_recipe(recipe, granularity=granularity, allocation=allocation, pattern=pattern)
    job = Job(
        request.with_numbers(parts, min_density=min_density, round_to=round_to, equal_widths=equal_widths, seed=seed),
        request.read_target(target),
        data=request.load_data(data),
        loss=request.load_loss(loss),
        heal=read_heal(heal),
        lr=lr,
        metric=request.load_function(metric, "metric"),
        max_drop=max_drop,
        skip=skip or (),
        only=only or (),
        factory=None if program else request.factory_of(model),
        source=model if Path(model).is_dir() and not program else None,
        command=shlex.join(["prunella", *sys.argv[1:]]),
    )
    opened = request.open_model(model, inputs, weights=weights, allow_pickle=allow_pickle, seed=seed, program=program)
    _do(opened, job, output, overwrite=overwrite, as_json=as_json)


def _do(opened: tuple[nn.Module, Inputs], job: Job, folder: Path, *, overwrite: bool, as_json: bool) -> None:
    from prunella.app.run import run as do
    from prunella.app.run import summary

    outcome = do(*opened, job, folder, overwrite=overwrite, on_stage=lambda text, s: note(f"{text} ({s:.1f} s)"))
    result = summary(outcome, job)
    emit(result, run_text(result, folder), as_json=as_json)


def _refuse(recipe: str, given: Mapping[str, object]) -> None:
    """Errors: RequestError for an option that this recipe does not use."""
    from prunella.errors import RequestError

    unused = [name for name, value in given.items() if value not in (None, False, "")]
    if unused:
        todo = "leave it out, or see `prunella run --help`"
        raise RequestError(f"{recipe} does not use {' or '.join(unused)}", "it would be without effect", todo)


def run_text(result: dict[str, Any], folder: Path) -> str:
    """The outcome of `run` for people; a demo has a verdict instead."""
    said = result.get("text", result.get("verdict", ""))
    reader = f"read it with {result['reader']}; " if "reader" in result else ""
    return f"{said}\n\n{folder}: {reader}look at {folder / 'report.html'}".lstrip()
