"""The verb that times a model with every available backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage
from prunella.measure.text import duration, interval, ratio, table

if TYPE_CHECKING:
    from prunella.app.backends import Bench


def bench(
    source: options.SourceOptions,
    factory: options.FactoryName = None,
    backends: Annotated[
        str, typer.Option(help="Comma-separated: eager, dense fast, compiled, onnxruntime, sparse.")
    ] = "eager,dense fast,compiled,onnxruntime,sparse",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma-separated; `all`: every core.")] = "1,all",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the speed-ups as an SVG.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Time MODEL side by side: eager, compiled, in ONNX Runtime, and with the sparse kernels."""
    from prunella.app.backends import bench as measure
    from prunella.app.backends import plot as draw
    from prunella.cli.parse import check_new_file, open_source

    check_new_file(plot, source, overwrite=overwrite)
    sizes, counts = _numbers(batch, "--batch"), _numbers(threads, "--threads")
    network, example = open_source(source, factory=factory)
    names = tuple(name.strip() for name in backends.split(","))
    with stage("measuring"):
        timed = measure(network, example, backends=names, batches=sizes, threads=counts)
    if plot is not None:
        from prunella.io.files import write_atomic

        note(f"wrote {write_atomic(plot, draw(timed).encode())}")
    emit(timed.as_dict(), _text(timed), as_json=as_json)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    import os

    from prunella.errors import RequestError

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [str(cores) if part.strip() == "all" else part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(
            f"{option} {text!r} cannot be read", "whole numbers, comma-separated, are needed", f"{option} 1,8"
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _text(timed: Bench) -> str:
    rows = [
        (r.threads, r.batch, r.backend, duration(r.milliseconds / 1e3), ratio(r.ratio), interval(r.low, r.high, ".2f"))
        for r in timed.rows
    ]
    lines = [table(("threads", "batch", "backend", "time", "against eager", "95 %"), rows, right=(0, 1, 3, 4, 5))]
    lines += [f"left out: {backend}: {why}" for backend, why in timed.left_out.items()]
    return "\n".join([*lines, f"{timed.machine}, sparse kernels: {timed.kernels}", timed.sparse]).rstrip()
