"""The stand-in for the kernels, none at all, and a decision that needs no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from prunella.measure.timing import Ratio
from prunella.runtime import dense
from prunella.runtime.kernels import library
from prunella.runtime.tuning import acceptance, tune
from prunella.runtime.tuning.choice import Choice, Problem, is_dense
from prunella.runtime.tuning.tune import Verdict
from tests.runtime import standin


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> standin.Calls:
    """Kernels are there, and what they were called for."""
    return standin.install(monkeypatch)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """The library was not built; the sentence that says so."""
    why = "the compiled kernels were not built when prunella was installed"
    monkeypatch.setattr(library, "load", lambda: library.Loaded(None, why))
    return why


@pytest.fixture
def eager_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate that is not of the base always wins, and the full model is always faster."""

    def decide(
        runs: Mapping[Choice, Any], problem: Problem, seconds: float, seed: int,
        base: Callable[[Choice], bool] = is_dense, before: Any = None,
    ) -> Verdict:  # fmt: skip
        others = [choice for choice in runs if not base(choice)]
        best = others[-1] if others else next(iter(runs))
        return Verdict(problem, best, best, Ratio(2.0, 1.9, 2.1))

    class Always:
        ratio = Ratio(2.0, 1.9, 2.1)

    for module in (tune, dense):
        monkeypatch.setattr(module, "decide", decide)
    for module in (acceptance, dense):
        monkeypatch.setattr(module, "interleaved", lambda runs, **_: Always())
