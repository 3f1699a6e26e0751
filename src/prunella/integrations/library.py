"""Base classes of other libraries: a callback can be imported, and its help read, without its library."""

from __future__ import annotations

from prunella.errors import MissingExtra
from prunella.io.load import import_with_operators


def bases(module: str, *names: str) -> tuple[type, ...]:
    """The classes of a module, or a stub for each that refuses to be used: see `check_library`."""
    try:
        library = import_with_operators(module)
        return tuple(getattr(library, name) for name in names)
    except (ImportError, RuntimeError) as error:  # RuntimeError: its own dependencies do not fit each other
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return tuple(type(f"_Missing{name}", (), {"reason": reason}) for name in names)


def check_library(base: type, what: str, extra: str) -> None:
    """Errors: MissingExtra if the library of a base class could not be imported."""
    reason = getattr(base, "reason", None)
    if reason is not None:
        raise MissingExtra(f"{what} needs {extra}", str(reason), f"pip install 'prunella[{extra}]'")
