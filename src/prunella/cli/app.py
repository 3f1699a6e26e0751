"""The application: the verbs in the order of `prunella --help`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from prunella._version import __version__
from prunella.cli import artifacts, bench, experiments, info, make
from prunella.cli.console import INTERRUPTED, guarded, report_usage
from prunella.cli.llm import llm
from prunella.cli.options import flat
from prunella.cli.run import run

_HELP = """Prune a neural network and recover its quality: smaller, measurably faster, and proven.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a check or a target missed, 2 misuse, 3 bad or
untrusted input, 5 out of memory or disk, 6 not supported here, 7 interrupted, 70 a bug in prunella."""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"prunella {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the verb."""
    if debug:
        os.environ["PRUNELLA_DEBUG"] = "1"


for verb in (
    make.demo,
    info.doctor,
    info.methods,
    info.explain,
    info.inspect,
    make.scan,
    make.plan,
    make.import_,
    info.show,
    run,
    llm,
    experiments.pareto,
    experiments.compare,
    bench.bench,
    make.export,
    artifacts.verify,
    artifacts.report,
):
    app.command(verb.__name__.rstrip("_"))(guarded(flat(verb)))


def parse_and_run(words: Sequence[str]) -> int:
    """Parse the words and run the verb; returns the exit code. Usage errors are reported, as JSON if requested."""
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("prunella", list(words)) as context:
            group.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort:
        return INTERRUPTED
    except _UsageError as error:
        return report_usage(error.format_message(), _shown(error), as_json="--json" in words)
    return 0


_UsageError: type[Any] = typer.BadParameter.__base__  # type: ignore[assignment]


def _shown(error: Any) -> str:
    """The parser's text for a usage error: the usage of the verb, and the error."""
    text = io.StringIO()
    error.show(text)
    return text.getvalue().rstrip()


def help_of(verb: str) -> str | None:
    """The help of a verb, or None if there is none. Parsing the line would load pydantic and take twice as long."""
    group: Any = typer.main.get_command(app)
    command = group.commands.get(verb)
    if command is None:
        return None
    parent = group.context_class(group, info_name="prunella")
    return str(command.get_help(command.context_class(command, info_name=verb, parent=parent)))
