"""Verbs that write a result: a plan, a pruned model, a file in another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage
from prunella.cli.device import only_on_cpu


def demo(
    output: options.Output = Path("demo"),
    model: Annotated[str, typer.Option(help="auto, minilm (extra `demo`) or digits (extra `digits`).")] = "auto",
    target: Annotated[float, typer.Option(help="Fraction of the MACs that is kept.")] = 0.5,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Run the full job on a pretrained network with real data, in about a minute: table, artifact, report.html."""
    from typing import get_args

    from prunella.app.demo import Which, run_demo
    from prunella.app.run import summary
    from prunella.cli.run import run_text
    from prunella.errors import RequestError, near_names

    only_on_cpu("the demo")
    which: dict[str, Which] = {name: name for name in get_args(Which)}
    if model not in which:
        near = near_names(model, which)
        why = f"it is one of {', '.join(which)}{f'; {near}' if near else ''}"
        raise RequestError(f"there is no demo {model!r}", why, "leave --model out")
    job, outcome = run_demo(output, model=which[model], target=target, seed=seed, overwrite=overwrite, stage=stage)
    result = summary(outcome, job)
    emit(result, run_text(result, output), as_json=as_json)


def plan(
    source: options.SourceOptions,
    budget: options.Budget,
    method: options.MethodOptions,
    other_inputs: options.OtherInputs = None,
    program: options.Program = False,
    output: options.OptionalOutput = None,
    as_json: options.Json = False,
) -> None:
    """Plan which units to keep so that the target is met; the model does not change. -o writes the plan to a file."""
    from prunella.cli import parse
    from prunella.io.plan_file import save_plan
    from prunella.planning.planner import plan as make_plan

    parse.check_new_plan(output, source, method.data, method.loss)
    recipe, target = parse.recipe_of(method, budget), parse.read_target(budget)
    by_hand = parse.read_by_hand(budget)
    data, loss = parse.load_data(method.data), parse.load_loss(method.loss)
    network, example = parse.open_source(source, seed=method.seed, program=program)
    inputs = parse.with_others(network, source.model, example, other_inputs, seed=method.seed)
    with stage("planning"):
        planned = make_plan(
            network,
            inputs,
            recipe,
            target=target,
            data=data,
            loss=loss,
            skip=method.skip or (),
            only=method.only or (),
            remove=by_hand.remove,
            keep=by_hand.keep,
            ratios=by_hand.ratios,
            counts=by_hand.counts,
            loadable=parse.read_loadable(budget),
        )
    if output is not None:
        note(f"wrote {save_plan(planned, output)}")
    emit(parse.plan_data(planned), str(planned), as_json=as_json)


def scan(
    source: options.SourceOptions,
    method: options.MethodOptions,
    metric: options.ScanMetricName = None,
    ratios: Annotated[
        str, typer.Option(metavar="R", help="Fractions removed, comma-separated.")
    ] = "0.1,0.25,0.5,0.75,0.9",
    program: options.Program = False,
    output: options.OptionalOutput = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves: FILE.svg or FILE.png.")
    ] = None,
    csv: options.CsvFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Measure sensitivity: cut each group alone and evaluate the model. A killed scan resumes from the folder -o."""
    from prunella.cli import parse
    from prunella.io.journal import NAME
    from prunella.measure.formats import csv_table
    from prunella.reporting.scan_chart import scan_chart
    from prunella.search import agreement, space
    from prunella.search import scan as measure
    from prunella.search.space import evaluated

    parse.check_journal_folder(output, source)
    kind = _kind_of_plot(plot)
    read = (source.model, source.weights, method.data, method.loss, metric)
    parse.check_tables(plot, csv, sources=(*read, output and output / NAME), overwrite=overwrite)
    recipe, fractions = parse.recipe_of(method), parse.read_ratios(ratios)
    data, evaluate = parse.load_data(method.data), parse.load_function(metric, "metric")
    network, example = parse.open_source(source, seed=method.seed, program=program)
    judge = evaluate or agreement(network, [example] if data is None else data)
    with stage("evaluating the dense model"):  # first, so that a broken metric fails before the long work
        base = evaluated(network, judge, recipe.seed)
    with stage("coupling and scoring"):
        groups = space(
            network, example, recipe, data=data, loss=parse.load_loss(method.loss),
            skip=method.skip or (), only=method.only or (),
        )  # fmt: skip
    scanned = measure(
        groups,
        judge,
        ratios=fractions,
        folder=output,
        base=base,
        on_point=lambda name, x, value: note(f"{name} {x:.0%}: {value:.4g}" if name else f"dense: {value:.4g}"),
    )
    parse.write_tables({
        csv: lambda: csv_table(("group", "removed", "quality", "lost"), scanned.rows()),
        plot: lambda: scan_chart(scanned.base, scanned.most_sensitive_first, kind),
    })  # fmt: skip
    emit({**scanned.as_dict(), "measured": scanned.measured}, str(scanned), as_json=as_json)


def _kind_of_plot(file: Path | None) -> Literal["svg", "png"]:
    """Errors: RequestError for another suffix."""
    from prunella.errors import RequestError

    kinds: dict[str, Literal["svg", "png"]] = {".svg": "svg", ".png": "png"}
    if file is not None and file.suffix not in kinds:
        raise RequestError(f"cannot draw {file}", "a plot is SVG or PNG, by its suffix", "for example --plot scan.svg")
    return "svg" if file is None else kinds[file.suffix]


def import_(
    source: options.SourceOptions,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="The pruned weights: a safetensors file, or a folder of them.", show_default=False
        ),
    ],
    masks: Annotated[str | None, typer.Option(metavar="FILE", help="Masks in a separate file.")] = None,
    key: Annotated[str, typer.Option(metavar="K", help="The entry of FILE with the weights, such as model_ema.")] = "",
    importer: Annotated[
        str | None, typer.Option(metavar="I", help="An importer of `methods`; recognized if not given.")
    ] = None,
    units: Annotated[
        bool, typer.Option("--units", help="Also remove units that are zero, instead of masking them.")
    ] = False,
    output: options.OptionalOutput = None,
    as_json: options.Json = False,
) -> None:
    """Import the result of another pruning tool as a plan for the dense MODEL. -o writes the plan to a file."""
    from prunella.cli import parse
    from prunella.io.importers import import_plan
    from prunella.io.plan_file import save_plan
    from prunella.registry import catalogue

    parse.check_new_plan(output, source, file, masks)
    reader = catalogue.lookup(importer, "importer").function if importer else None
    network, example = parse.open_source(source)
    with stage(f"importing {file}"):
        imported = import_plan(
            network, example, file, masks=masks, importer=reader, key=key, units=units, allow_pickle=source.allow_pickle
        )
    if output is not None:
        note(f"wrote {save_plan(imported, output)}")
    emit(parse.plan_data(imported), str(imported), as_json=as_json)


def export(
    source: options.SourceOptions,
    output: options.Output,
    factory: options.FactoryName = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="The file takes images of any height and width, where the model does.")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Export a model, or a folder of `run`, to FILE.safetensors, FILE.pt2 or FILE.onnx; read it back and compare."""
    from prunella.cli.parse import check_new_file, open_source
    from prunella.io.export import check_format
    from prunella.io.export import export as write

    only_on_cpu("an export")
    check_new_file(output, source, factory, overwrite=overwrite)
    check_format(output)
    network, example = open_source(source, factory=factory)
    with stage(f"writing {output}"):
        written = write(network, output, inputs=example, any_size=any_size)
    emit(asdict(written), str(written), as_json=as_json)
