"""The verb that times a model by every road there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage, table

if TYPE_CHECKING:
    from prunella.app.backends import Bench


def bench(
    model: options.Model,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    factory: options.FactoryName = None,
    roads: Annotated[
        str, typer.Option(help="By comma: eager, dense fast, compiled, onnxruntime, sparse.")
    ] = "eager,dense fast,compiled,onnxruntime,sparse",
    batch: Annotated[str, typer.Option(help="Batch sizes by comma.")] = "1",
    threads: Annotated[str, typer.Option(help="Numbers of threads by comma; `all` is every core.")] = "1,all",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the speed-ups as an SVG.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Time MODEL in eager mode, compiled, in ONNX Runtime and skipping its zeros, side by side."""
    from prunella.app.backends import bench as measure
    from prunella.app.backends import plot as draw
    from prunella.cli.parse import check_new_file, open_model

    if plot is not None:
        check_new_file(plot, overwrite=overwrite)
    sizes, counts = _numbers(batch, "--batch"), _numbers(threads, "--threads")
    network, example = open_model(model, inputs, weights=weights, factory=factory)
    with stage("measuring"):
        found = measure(
            network, example, roads=tuple(r.strip() for r in roads.split(",")), batches=sizes, threads=counts
        )
    if plot is not None:
        from prunella.io.files import write_atomic

        note(f"wrote {write_atomic(plot, draw(found).encode())}")
    emit(found.as_dict(), _text(found), as_json=as_json)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    import os

    from prunella.errors import RequestError

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [str(cores) if part.strip() == "all" else part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"{option} {text!r} cannot be read", "whole numbers by comma are needed", f"{option} 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def _text(found: Bench) -> str:
    rows = [
        (r.threads, r.batch, r.road, f"{r.milliseconds:.2f}", f"{r.ratio:.2f}x", f"{r.low:.2f}-{r.high:.2f}")
        for r in found.rows
    ]
    lines = [table(("threads", "batch", "road", "ms", "against eager", "95 %"), rows, right=(0, 1, 3, 4, 5))]
    lines += [f"left out: {road}: {why}" for road, why in found.left_out.items()]
    return "\n".join([*lines, f"{found.machine}, sparse kernels: {found.kernels}", found.sparse]).rstrip()
