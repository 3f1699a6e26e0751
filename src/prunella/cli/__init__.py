"""The command line: verbs of `prunella`, thin over the library. Torch is imported inside a verb, never for `--help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in `SystemExit` with the exit code of the documentation."""
    from prunella.cli.app import app, help_of

    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in words:  # wherever it stands
        words = ["--debug", *(word for word in words if word != "--debug")]
    if words and words[-1] == "--help" and (text := help_of(words[0])):
        print(text)
        raise SystemExit(0)
    app(words, prog_name="prunella")
