"""The verbs that compare methods with each other and with baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage

Make = Annotated[
    str, typer.Argument(metavar="MAKE", help="module:function that takes a seed and returns the trained dense model.",
                        show_default=False)
]  # fmt: skip


def pareto(
    make: Make,
    metric: Annotated[
        str, typer.Option("--metric", metavar="M:F", help="module:function of (model); higher is better.")
    ],
    inputs: Annotated[str, typer.Option("--inputs", metavar="M:F", help="module:function that returns a batch.")],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", metavar="NAME", help="A recipe or a criterion; several are allowed.")
    ] = None,
    granularity: options.GranularityText = None,
    allocation: options.AllocationName = None,
    ratios: Annotated[str, typer.Option(help="Original / new, by comma.")] = "2,4,8,16,32",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    unit: Annotated[str, typer.Option(help="What is divided: params, macs, bytes or sparsity.")] = "params",
    data: options.Data = None,
    loss: options.LossName = None,
    recover: Annotated[
        str | None, typer.Option(metavar="M:F", help="module:function of (model, plan, seed) that heals.")
    ] = None,
    skip: options.Skip = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    output: options.Output = Path("pareto"),
    as_json: options.Json = False,
) -> None:
    """Quality against size: recipes beside random and magnitude baselines, several ratios and seeds; resumable."""
    from prunella.cli.parse import build_recipe
    from prunella.experiments.pareto import PAGE, Study
    from prunella.experiments.pareto import pareto as run
    from prunella.targets import parse_target

    recipes = {name: build_recipe(name, granularity=granularity, allocation=allocation) for name in recipe or ()}
    study = Study(make, metric, inputs, recipes, data, loss, recover, tuple(skip or ()))
    divided = type(parse_target(f"{unit}=0.5"))
    with stage("comparing"):
        found = run(
            study, output, ratios=_numbers(ratios), seeds=tuple(range(seeds)), unit=divided, jobs=jobs,
            on_cell=lambda cell, n, total: note(f"{n} of {total}: {cell.method}, {cell.ratio:g}x, seed {cell.seed}"),
        )  # fmt: skip
    emit({**found.data(), "page": str(output / PAGE)}, f"{found}\n\nwrote {output / PAGE}", as_json=as_json)


def compare(
    model: options.Model,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Text to calibrate with.")],
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="Other text, to judge by.")],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", metavar="NAME", help="one_shot, admm, alps, sparsegpt, wanda ...")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction removed from every layer (0.5).")] = None,
    pattern: options.Pattern = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0: each draws other windows of --data.")] = 3,
    windows: Annotated[int, typer.Option(help="Windows to calibrate with.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in one of them.")] = 512,
    judged: Annotated[int, typer.Option(help="Windows of --text at most; a quarter of them for KL and top-1.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens in one of them.")] = 1024,
    skip: options.Skip = None,
    output: options.Output = Path("compared"),
    as_json: options.Json = False,
) -> None:
    """Language models: recipes over seeds in one table, with perplexity, agreement with the dense model and seconds.

    The dense model and a pruned one are in memory together. A comparison that was stopped goes on with the same line.
    """
    from prunella.cli import llm as language

    asked = {name: language.recipe_of(name, pattern, sparsity) for name in recipe or ("one_shot", "sparsegpt", "wanda")}
    protocol = language.Protocol(data, text, windows, length, judged, window, tuple(skip or ()))
    found, said = language.compare(language.folder_of(model), asked, protocol, seeds, output)
    values = {way: {name: list(v) for name, v in by.items()} for way, by in found.values.items()}
    emit({"values": values, "seeds": list(found.seeds), "protocol": said}, f"{found}\n\n{said}", as_json=as_json)


def _numbers(text: str) -> tuple[float, ...]:
    from prunella.errors import RequestError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"cannot read the ratios {text!r}", "numbers above 1, by comma", "--ratios 2,4,8") from None
