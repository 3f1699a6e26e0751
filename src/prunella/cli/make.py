"""Verbs that make something: a plan, a pruned model, a file in another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage


def demo(
    output: options.Output = Path("demo"),
    model: Annotated[str, typer.Option(help="auto, minilm (extra `demo`) or digits (extra `digits`).")] = "auto",
    target: Annotated[float, typer.Option(help="Fraction of the multiply-adds that stays.")] = 0.5,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """The main job on a real pretrained network with real data, in about a minute: table, artefact, report.html."""
    from typing import get_args

    from prunella.app.demo.run import Which, run_demo
    from prunella.errors import RequestError

    which: dict[str, Which] = {name: name for name in get_args(Which)}
    if model not in which:
        raise RequestError(f"there is no demo {model!r}", f"it is one of {', '.join(which)}", "leave --model out")
    result = run_demo(output, model=which[model], target=target, seed=seed, overwrite=overwrite)
    emit(result.as_dict(), str(result), as_json=as_json)


def plan(
    model: options.Model,
    recipe: options.RecipeName = "magnitude",
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
    data: options.Data = None,
    loss: options.LossName = None,
    program: options.Program = False,
    seed: options.Seed = 0,
    output: options.OptionalOutput = None,
    as_json: options.Json = False,
) -> None:
    """Decide what to keep so that the target is met; the model is only read. -o writes the plan to a file."""
    from prunella.cli import parse as request
    from prunella.io.plan_file import save_plan
    from prunella.planning.planner import plan as make_plan

    parts = request.build_recipe(recipe, granularity=granularity, allocation=allocation, pattern=pattern)
    parts = request.with_numbers(
        parts, min_density=min_density, round_to=round_to, equal_widths=equal_widths, seed=seed
    )
    budget = request.read_target(target)
    batches, measure = request.load_data(data), request.load_loss(loss)
    network, example = request.open_model(
        model, inputs, weights=weights, allow_pickle=allow_pickle, seed=seed, program=program
    )
    with stage("planning"):
        made = make_plan(
            network,
            example,
            parts,
            target=budget,
            data=batches,
            loss=measure,
            skip=skip or (),
            only=only or (),
        )
    if output is not None:
        note(f"wrote {save_plan(made, output)}")
    emit(request.plan_data(made), str(made), as_json=as_json)


def scan(
    model: options.Model,
    metric: Annotated[
        str | None,
        typer.Option(metavar="M:F", help="module:function of (model); higher is better. Default: agreement on --data."),
    ] = None,
    recipe: options.RecipeName = "magnitude",
    ratios: Annotated[str, typer.Option(metavar="R", help="Fractions removed, by comma.")] = "0.1,0.25,0.5,0.75,0.9",
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    allow_pickle: options.AllowPickle = False,
    granularity: options.GranularityText = None,
    min_density: options.MinDensity = None,
    round_to: options.RoundTo = None,
    skip: options.Skip = None,
    only: options.Only = None,
    data: options.Data = None,
    loss: options.LossName = None,
    program: options.Program = False,
    seed: options.Seed = 0,
    output: options.OptionalOutput = None,
    as_json: options.Json = False,
) -> None:
    """Sensitivity: cut each group alone, for real, and evaluate. -o is a folder in which a killed scan goes on."""
    from prunella.cli import parse as request
    from prunella.search import agreement, space
    from prunella.search import scan as measure

    parts = request.with_numbers(
        request.build_recipe(recipe, granularity=granularity),
        min_density=min_density,
        round_to=round_to,
        equal_widths=False,
        seed=seed,
    )
    fractions = request.read_ratios(ratios)
    batches, evaluate = request.load_data(data), request.load_function(metric, "metric")
    network, example = request.open_model(
        model, inputs, weights=weights, allow_pickle=allow_pickle, seed=seed, program=program
    )
    with stage("coupling and scoring"):
        groups = space(
            network, example, parts, data=batches, loss=request.load_loss(loss), skip=skip or (), only=only or ()
        )
    found = measure(
        groups,
        evaluate or agreement(network, [example] if batches is None else batches),
        ratios=fractions,
        folder=output,
        on_point=lambda name, x, value: note(f"{name} {x:.0%}: {value:.4g}" if name else f"dense: {value:.4g}"),
    )
    emit({**found.as_dict(), "measured": found.measured}, str(found), as_json=as_json)


def import_(
    model: options.Model,
    source: Annotated[str, typer.Argument(metavar="FILE", help="What was pruned: safetensors, or a folder of them.")],
    masks: Annotated[str | None, typer.Option(metavar="FILE", help="Masks that are kept apart.")] = None,
    importer: Annotated[
        str | None, typer.Option(metavar="I", help="An importer of `methods`; found out if left.")
    ] = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    allow_pickle: options.AllowPickle = False,
    output: options.OptionalOutput = None,
    as_json: options.Json = False,
) -> None:
    """Turn what another tool pruned into a plan for the dense MODEL. -o writes the plan to a file."""
    from prunella.cli import parse as request
    from prunella.io.importers import import_plan
    from prunella.io.plan_file import save_plan
    from prunella.registry import catalogue

    reader = catalogue.lookup(importer, "importer").function if importer else None
    network, example = request.open_model(model, inputs, weights=weights, allow_pickle=allow_pickle)
    with stage(f"importing {source}"):
        made = import_plan(network, example, source, masks=masks, importer=reader, allow_pickle=allow_pickle)
    if output is not None:
        note(f"wrote {save_plan(made, output)}")
    emit(request.plan_data(made), str(made), as_json=as_json)


def export(
    model: options.Model,
    output: options.Output,
    factory: options.FactoryName = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    allow_pickle: options.AllowPickle = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a model, or a folder of `run`, as FILE.safetensors, FILE.pt2 or FILE.onnx; read it again and compare."""
    from prunella.cli.parse import check_new_file, open_model
    from prunella.io.export import export as write

    check_new_file(output, overwrite=overwrite)
    network, example = open_model(model, inputs, weights=weights, allow_pickle=allow_pickle, factory=factory)
    with stage(f"writing {output}"):
        written = write(network, output, inputs=example)
    emit(asdict(written), str(written), as_json=as_json)
