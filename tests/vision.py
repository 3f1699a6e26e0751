"""timm and torchvision for tests, also where the torchvision of PyPI does not fit a CPU build of torch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from prunella.errors import BadInput, MissingExtra
from prunella.io.load import import_module


def timm_or_skip() -> Any:
    """The module timm; skips the test where it is not installed."""
    return _module_or_skip("timm")


def torchvision_or_skip() -> Any:
    """The module torchvision; skips the test where it is not installed."""
    return _module_or_skip("torchvision")


def _module_or_skip(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        try:
            return import_module(name)
        except (MissingExtra, BadInput) as error:
            return pytest.skip(str(error))
