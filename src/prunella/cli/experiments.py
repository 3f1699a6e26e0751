"""The verbs that compare methods with each other and with baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage
from prunella.cli.device import moved, only_on_cpu, placed
from prunella.cli.llm_request import folder_of, llm_recipe

if TYPE_CHECKING:
    from torch import nn

    from prunella.experiments.comparison import Compared
    from prunella.llm import OneShot

Make = Annotated[
    str, typer.Argument(metavar="MAKE", help="module:function that takes a seed and returns the trained dense model.",
                        show_default=False)
]  # fmt: skip


def pareto(
    make: Make,
    metric: Annotated[
        str, typer.Option("--metric", metavar="M:F", help="module:function of (model): a number; higher is better.")
    ],
    inputs: Annotated[str, typer.Option("--inputs", metavar="M:F", help="module:function that returns a batch.")],
    recipe: options.RecipeNames = None,
    granularity: options.GranularityText = None,
    allocation: options.AllocationName = None,
    ratios: Annotated[str, typer.Option(help="Original / new, comma-separated.")] = "2,4,8,16,32",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 3,
    unit: Annotated[str, typer.Option(help="Unit of the ratios: params, macs, bytes or sparsity.")] = "params",
    data: options.Data = None,
    loss: options.LossName = None,
    recover: Annotated[
        str | None, typer.Option(metavar="M:F", help="module:function of (model, plan, seed) that recovers.")
    ] = None,
    skip: options.Skip = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    output: options.Output = Path("pareto"),
    csv: options.CsvFile = None,
    latex: options.LatexFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Quality against size: recipes and random and magnitude baselines, at several ratios and seeds; resumable."""
    from prunella.cli.parse import build_recipe, check_tables, write_tables
    from prunella.experiments.pareto_experiment import PAGE, RECORD, ParetoExperiment
    from prunella.experiments.pareto_experiment import pareto as run
    from prunella.io.journal import NAME
    from prunella.io.space import check_room_for_journal
    from prunella.targets import parse_target

    only_on_cpu("a study over seeds")
    check_room_for_journal(output)
    read, own = (make, metric, inputs, data, loss, recover), (output / NAME, output / RECORD, output / PAGE)
    check_tables(csv, latex, sources=(*read, *own), overwrite=overwrite)
    recipes = {name: build_recipe(name, granularity=granularity, allocation=allocation) for name in recipe or ()}
    experiment = ParetoExperiment(make, metric, inputs, recipes, data, loss, recover, tuple(skip or ()))
    divided = type(parse_target(f"{unit}=0.5"))
    with stage("comparing"):
        frontier = run(
            experiment, output, ratios=_numbers(ratios), seeds=tuple(range(seeds)), unit=divided, jobs=jobs,
            on_cell=lambda cell, n, total: note(f"{n} of {total}: {cell.method}, {cell.ratio:g}x, seed {cell.seed}"),
        )  # fmt: skip
    write_tables({csv: frontier.csv, latex: frontier.latex})
    page = output / PAGE if (output / PAGE).is_file() else None
    text = f"{frontier}\n\nwrote {page or output / RECORD}"
    emit({**frontier.data(), "page": str(page) if page else None}, text, as_json=as_json)


@dataclass(frozen=True)
class Protocol:
    """The calibration and evaluation data that all rows of a comparison share."""

    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Text to calibrate with.", show_default=False)]
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="Other text, to evaluate on.", show_default=False)]
    nsamples: Annotated[int, typer.Option("--nsamples", help="Windows of --data to calibrate with.")] = 32
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in one of them.")] = 512
    eval_samples: Annotated[
        int, typer.Option("--eval-samples", help="Most windows of --text; a quarter of them for KL and top-1.")
    ] = 16
    eval_seqlen: Annotated[int, typer.Option("--eval-seqlen", help="Tokens in one of them.")] = 1024
    skip: options.Skip = None


def compare(
    model: options.LLMModel,
    protocol: Protocol,
    recipe: options.LLMRecipeNames = None,
    sparsity: options.LayerSparsity = None,
    pattern: options.Pattern = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0; each draws other windows of --data.")] = 3,
    output: options.Output = Path("compared"),
    csv: options.CsvFile = None,
    latex: options.LatexFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Language models: recipes over seeds in one table, with perplexity, agreement with the dense model and seconds.

    The dense model and one pruned model are in memory together. The same command resumes an interrupted comparison.
    """
    from prunella.cli.parse import check_tables, write_tables
    from prunella.io.journal import NAME
    from prunella.io.space import check_apart, check_room_for_journal

    check_apart(output, model, protocol.data, protocol.text)
    check_room_for_journal(output)
    read = (model, protocol.data, protocol.text, output / NAME)
    check_tables(csv, latex, sources=read, overwrite=overwrite)
    recipes = {name: llm_recipe(name, pattern, sparsity) for name in recipe or ("one_shot", "sparsegpt", "wanda")}
    compared, how = _compare(folder_of(model), recipes, protocol, seeds, output)
    write_tables({csv: compared.csv, latex: compared.latex})
    values = {method: {name: list(v) for name, v in by.items()} for method, by in compared.values.items()}
    result = {"values": values, "seeds": list(compared.seeds), "protocol": how}
    emit(result, f"{compared}\n\n{how}", as_json=as_json)


def _compare(
    folder: Path, recipes: Mapping[str, OneShot], protocol: Protocol, seeds: int, output: Path
) -> tuple[Compared, str]:
    """The table, and a sentence on how its numbers were measured."""
    from prunella import metrics
    from prunella.errors import RequestError
    from prunella.experiments import comparison
    from prunella.io.files import digest
    from prunella.io.load import load_model
    from prunella.llm import solve_
    from prunella.llm.text import text_samples, text_tokens
    from prunella.model.copying import copied
    from prunella.registry.serialize import described

    if min(seeds, protocol.eval_samples) < 1:
        raise RequestError(
            "there is nothing to compare",
            f"--seeds {seeds}, --eval-samples {protocol.eval_samples}",
            "the minimum is 1",
        )
    dense, tokens = placed(load_model(str(folder))), moved(text_tokens(folder, protocol.text))
    window = protocol.eval_seqlen
    count = min(protocol.eval_samples, len(tokens) // window)
    few = [{"input_ids": tokens[k * window :][:window][None]} for k in range(-(-count // 4))]

    def perplexity(model: nn.Module) -> float:
        return metrics.perplexity(model, tokens, window=window, limit=protocol.eval_samples).value

    def agreement(model: nn.Module) -> tuple[float, float]:
        outputs = metrics.token_agreement(dense, model, few)
        return outputs.kl, outputs.top1

    def pruned(name: str, seed: int) -> nn.Module:
        nsamples, seqlen = protocol.nsamples, protocol.seqlen
        batches = moved(text_samples(folder, protocol.data, nsamples=nsamples, seqlen=seqlen, seed=seed))
        model = copied(dense)
        with stage(f"{name}, seed {seed}"):
            solve_(model, batches[0], recipes[name], data=batches, skip=tuple(protocol.skip or ()))
        return model

    files = [digest(Path(file)).removeprefix("sha256:") for file in (protocol.data, protocol.text)]
    twice = "; both are the same text, so the numbers of all methods are too good" if files[0] == files[1] else ""
    if twice:
        note(f"{protocol.text} is the calibration text: numbers on it are too good, give another text by --text")
    settings = [asdict(protocol), files, {name: described(recipe) for name, recipe in recipes.items()}]
    methods = {name: partial(pruned, name) for name in recipes}
    measures: comparison.Measures = {"perplexity": perplexity, ("KL", "top-1"): agreement}
    compared = comparison.compare(dense, methods, measures, seeds=range(seeds), folder=output, asked=settings)
    return compared, (
        f"evaluated on {count} windows of {window} tokens of {protocol.text} without overlap, {len(few)} of them for "
        f"KL (in nats) and top-1; calibrated on {protocol.nsamples} windows of {protocol.seqlen} of {protocol.data}"
        f"{twice}"
    )


def _numbers(text: str) -> tuple[float, ...]:
    from prunella.errors import RequestError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"cannot read the ratios {text!r}", "numbers above 1, comma-separated, are needed", "--ratios 2,4,8"
        ) from None
