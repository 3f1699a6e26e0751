"""For all tests: transformers imports torchvision, whose own operators may not fit a CPU build of torch.

The slow tests run first, so that at the end no process waits for one of them. No test asserts a time, so that what is
timed takes few samples. Guesses of sizes are for the tests of coupling: the others check what follows from a plan.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunella.graph import guesses
from prunella.io.load import import_module
from prunella.measure import timing

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


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not look through it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(7000, 10, 20)


_measure = timing._measure
_FEW = 5


@pytest.fixture(scope="session", autouse=True)
def few_samples() -> Iterator[None]:
    """Comparisons of latencies in this process take five rounds of single calls, whatever they say."""

    def measure(candidates: Any, rounds: int, *rest: Any) -> Any:
        return _measure(candidates, min(rounds, _FEW), *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "_measure", measure)
        patched.setattr(timing, "_SHORTEST", 0.0)
        yield


_COUPLING = {"generated", "graph", "model", "zoo"}


@pytest.fixture(scope="module", autouse=True)
def few_guesses(request: pytest.FixtureRequest) -> Iterator[None]:
    """Outside the folders on coupling, plans try the two nearest of the sizes that the source may treat otherwise."""
    with pytest.MonkeyPatch.context() as patched:
        first, *rest = request.path.relative_to(Path(__file__).parent).parts
        if first not in _COUPLING or rest[:1] == ["depth"]:  # what follows from blocks that go, not how they are found
            patched.setattr(guesses, "_RUNS", 2)
        yield


@pytest.fixture
def every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons take all the samples that they say."""
    monkeypatch.setattr(timing, "_measure", _measure)
    monkeypatch.setattr(timing, "_SHORTEST", 2e-3)
