"""For all tests: transformers imports torchvision, whose own operators may not fit a CPU build of torch.

The slow tests run first, so that at the end no process waits for one of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import warnings

import pytest

from prunella.io.load import import_module

if importlib.util.find_spec("torchvision") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own import
        import_module("torchvision")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background: tests interrupt
    with contextlib.suppress(ValueError):  # in the main thread alone
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, all others in their order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
