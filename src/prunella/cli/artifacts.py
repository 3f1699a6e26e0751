"""Verbs about a folder that `run` wrote: `verify` checks it, `report` shows its report."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder that `run` or `demo` wrote.", show_default=False)
]


def verify(
    folder: Folder,
    model: options.OptionalModel = None,
    inputs: options.Inputs = None,
    weights: options.Weights = None,
    weights_key: options.WeightsKey = "",
    allow_pickle: options.AllowPickle = False,
    as_json: options.Json = False,
) -> None:
    """Check digests and that the model loads; with MODEL, that it equals the dense model with the same units masked."""
    from functools import partial

    from torch.fx import GraphModule

    from prunella.app.verify import check_equal, check_folder, plan_of
    from prunella.cli.parse import factory_of, open_dense
    from prunella.graph.program.capture import as_program
    from prunella.io.load import load_model

    with stage("checking digests and loading"):
        build = (factory_of(model) or partial(load_model, model, allow_pickle=allow_pickle)) if model else None
        verified, small = check_folder(folder, factory=build)
    if model is not None and small is not None:
        plan = plan_of(folder)
        dense, example = open_dense(
            model, inputs, plan.inputs, weights=weights, weights_key=weights_key, allow_pickle=allow_pickle
        )
        if isinstance(small, GraphModule) and not isinstance(dense, GraphModule):
            dense = as_program(dense, example)
        with stage("comparing with the masked dense model"):
            verified = check_equal(verified, small, dense, plan, example)
    emit(verified.as_dict(), str(verified), as_json=as_json)


def report(
    folder: Folder,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the numbers of a run, and the path of its page."""
    from prunella.app.record import read_record
    from prunella.cli.run import run_text
    from prunella.errors import BadInput
    from prunella.io.untrusted import check_links

    check_links(folder)
    page, record = folder / "report.html", read_record(folder)
    if not page.is_file() and (open_page or record is None):
        raise BadInput(f"no report in {folder}", "there is no report.html", "give a folder that `prunella run` wrote")
    result: dict[str, Any] = {"page": str(page.resolve()) if page.is_file() else None}
    if record is not None:
        result |= {**record.data, "folder": str(folder)}
    try:
        text = run_text(result, folder)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"cannot read the record of {folder}", f"damaged: {error}", "run it again") from error
    emit(result, text, as_json=as_json)
    if open_page and not webbrowser.open(page.resolve().as_uri()):
        note("no browser could be started; open the page yourself")
