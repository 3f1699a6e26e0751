"""The command line: thin verbs over the library. Torch is imported inside a verb, never for `--help`."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always raises `SystemExit`, with a documented exit code."""
    from prunella.cli.console import prepare_streams

    if arguments is None:
        arguments = sys.argv[1:]
        prepare_streams()
        if not sys.warnoptions:  # warnings of other libraries do not help the user; python -W shows them
            warnings.simplefilter("ignore")
            for library in ("torchao", "torch.utils._pytree"):
                logging.getLogger(library).setLevel(logging.ERROR)
        end_as_interrupted()
    words = list(arguments)
    if "--debug" in words:  # at any position
        words = ["--debug", *(word for word in words if word != "--debug")]
    raise SystemExit(_run(words))


def _run(words: list[str]) -> int:
    """Run the verb of this command line; returns the exit code."""
    from prunella.cli.app import help_of, parse_and_run
    from prunella.cli.console import reader_may_leave, report_error

    code = 0
    try:
        with reader_may_leave():
            if words and words[-1] == "--help" and (text := help_of(words[0])):
                print(text)
            else:
                code = parse_and_run(words)
            sys.stdout.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        code = report_error(error, {"as_json": "--json" in words})
    return code


def end_as_interrupted() -> None:
    """Handle SIGTERM, and SIGHUP of a closed terminal, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
