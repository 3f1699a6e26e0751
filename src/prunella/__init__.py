"""Prune a neural network, and heal it: smaller, measurably faster, and proven.

Public names are loaded when first used, so that the command line answers before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunella.errors import PruningError as PruningError
    from prunella.targets import MACs as MACs

__version__ = "0.1.0"

_HOME = {
    "PruningError": "errors",
    "MACs": "targets",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunella' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prunella.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
