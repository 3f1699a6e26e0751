"""The verb that does the full job on a network."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunella.cli import options
from prunella.cli.console import emit, stage
from prunella.measure.text import file_name

if TYPE_CHECKING:
    from prunella.app.job import Job


def run(
    source: options.SourceOptions,
    budget: options.Budget,
    method: options.MethodOptions,
    recover: options.RecoveryOptions,
    quality: options.Quality,
    program: options.Program = False,
    output: options.Output = Path("pruned"),
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Plan, cut, recover, check and measure; write the smaller model and report.html to a folder."""
    from prunella.app.run import run as do
    from prunella.app.run import summary
    from prunella.app.stages import clean_finished
    from prunella.cli.parse import open_source
    from prunella.io.space import check_output_folder

    clean_finished(output)
    check_output_folder(output, source.model, source.weights, overwrite=overwrite)
    job = _job(source, budget, method, recover, quality, program=program)
    model, inputs = open_source(source, seed=method.seed, program=program)
    result = summary(do(model, inputs, job, output, overwrite=overwrite, stage=stage), job)
    emit(result, run_text(result, output), as_json=as_json)


def _job(
    source: options.SourceOptions,
    budget: options.Budget,
    method: options.MethodOptions,
    recover: options.RecoveryOptions,
    quality: options.Quality,
    *,
    program: bool,
) -> Job:
    from prunella.app.job import Job, Recovery, read_steps
    from prunella.cli import parse

    auto = parse.is_auto(method, budget, recover)
    return Job(
        parse.recipe_of(replace(method, recipe=None) if auto else method, budget),
        parse.read_target(budget),
        data=parse.load_data(method.data),
        loss=parse.load_loss(method.loss),
        recovery=Recovery(
            read_steps(recover.recover), parse.load_data(recover.recover_data), lr=recover.lr, ridge=recover.ridge
        ),
        metric=parse.load_function(quality.metric, "metric"),
        max_drop=quality.max_drop,
        skip=method.skip or (),
        only=method.only or (),
        by_hand=parse.read_by_hand(budget),
        loadable=parse.read_loadable(budget),
        factory=None if program else parse.factory_of(source.model),
        source=source.model if Path(source.model).is_dir() and not program else None,
        command=shlex.join(["prunella", *map(named, sys.argv[1:])]),
        auto=auto,
    )


def named(word: str) -> str:
    """A word of the command line for the record; of an absolute path only the last name, since folders name people."""
    option, mark, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{mark}{file_name(value)}"


def run_text(result: dict[str, Any], folder: Path) -> str:
    """The outcome of `run` as text; a demo of version 0.1 has a verdict instead of a text."""
    text = result.get("text", result.get("verdict", ""))
    reader = f"read it with {result['reader']}; " if "reader" in result else ""
    page = result.get("missing") or f"look at {folder / 'report.html'}"
    return f"{text}\n\n{folder}: {reader}{page}".lstrip()
