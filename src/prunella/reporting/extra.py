"""The extra `report`: matplotlib for the charts and jinja2 for the pages; other code does not need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prunella.errors import MissingExtra


@contextmanager
def needing_report(what: str) -> Iterator[None]:
    """Inside, imports that `what` needs. Errors: MissingExtra, with the command that installs them."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            f"{what} needs {error.name}", "it is not installed", "pip install 'prunella[report]'"
        ) from error


def reason_without(write: Callable[[], object], name: str) -> str:
    """Call `write`, which writes the page `name`; returns a line that names the missing extra, or an empty text."""
    try:
        write()
    except MissingExtra as error:
        return f"no {name}: {error.what}, and {error.why}: {error.todo}"
    return ""
