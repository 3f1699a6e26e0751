"""A factory for each model of the zoo, as `made:SUITE_NUMBER`, for artifacts that name what made their model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def name(suite: str, number: int) -> str:
    """The factory of a model, as `save` and `load` take it."""
    return f"made:{suite}_{number}"


def __getattr__(wanted: str) -> Callable[[], nn.Module]:
    from run import SUITES, suite_module

    suite, _, number = wanted.rpartition("_")
    if suite not in SUITES:
        raise AttributeError(wanted)

    def build() -> nn.Module:
        found = suite_module(suite)
        model: nn.Module = found.build(found.names()[int(number)])[0]
        return model

    return build
