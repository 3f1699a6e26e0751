"""The extra `report`: matplotlib draws the charts, jinja2 fills in the pages. Nothing else needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prunella.errors import MissingExtra


@contextmanager
def needing_report(what: str) -> Iterator[None]:
    """Imports that `what` needs. Errors: MissingExtra, which says how to get them."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            f"{what} needs {error.name}", "it is not installed", "pip install 'prunella[report]'"
        ) from error


def reason_without(write: Callable[[], object], name: str) -> str:
    """Call `write`, which writes the page `name`; where the extra is missing, the line that says so, else nothing."""
    try:
        write()
    except MissingExtra as error:
        return f"no {name}: {error.what}, and {error.why}: {error.todo}"
    return ""
