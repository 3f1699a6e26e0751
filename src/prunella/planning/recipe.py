"""Recipes: the parts that determine how a model is pruned, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunella.allocation import uniform
from prunella.allocation.pool import Allocation
from prunella.criteria import magnitude
from prunella.errors import BadInput
from prunella.granularity import Channel, Granularity
from prunella.planning.checks import check_function, check_granularity, check_numbers
from prunella.planning.scoring import Criterion
from prunella.registry import serialize


@dataclass(frozen=True)
class Recipe:
    """How to prune: freely combinable parts. Knobs of the functions are bound by `functools.partial`.

    criterion: a function from statistics to scores (`prunella.criteria`, or your own).
    granularity: the kind of unit; several structural ones, such as `(Channel(), Head())`, share one ranking.
    allocation: the sparsity of each group or layer (`prunella.allocation`).
    min_density: smallest kept fraction, in [0, 1), of every group's units (of every layer's weights).
    round_to: pruned widths of channel groups are multiples of this number; not for heads and masks.
    seed: of everything random. The same seed gives the same plan.
    equal_widths: units with equal keys are removed together, so that equal groups under `uniform` remain equal, and
        plain `from_pretrained` loads a transformers model. The target is then exceeded by up to one unit per group.
    min_units: smallest number of units (weights) of every group (layer): 1, or 0 for masks that may empty layers.

    Example:

        >>> import functools, prunella as pr
        >>> squared = functools.partial(pr.magnitude, p=2)
        >>> recipe = pr.Recipe(criterion=squared, granularity=(pr.Channel(), pr.Head()), allocation=pr.global_)
        >>> recipe.min_density, recipe.round_to
        (0.0, 1)
    """

    criterion: Criterion = magnitude
    granularity: Granularity | tuple[Granularity, ...] = Channel()  # noqa: RUF009
    allocation: Allocation = uniform
    min_density: float = 0.0
    round_to: int = 1
    seed: int = 0
    equal_widths: bool = False
    min_units: int = 1

    def __post_init__(self) -> None:
        check_function(self.criterion, "criterion")
        check_function(self.allocation, "allocation")
        check_granularity(self.granularities)
        check_numbers(
            self.granularities,
            min_density=self.min_density,
            round_to=self.round_to,
            seed=self.seed,
            min_units=self.min_units,
        )

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """The granularities as a tuple."""
        return self.granularity if isinstance(self.granularity, tuple) else (self.granularity,)

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, all knobs with their values; `Recipe.read` gives it back."""
        return {
            "criterion": serialize.describe(self.criterion),
            "granularity": [serialize.describe(entry) for entry in self.granularities],
            "allocation": serialize.describe(self.allocation),
            "min_density": self.min_density,
            "round_to": self.round_to,
            "seed": self.seed,
            "equal_widths": self.equal_widths,
            "min_units": self.min_units,
        }

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Recipe:
        """The recipe that `describe` wrote, here or in 0.1. Errors: RequestError for unknown functions."""
        try:
            entries = current_names(described)
            granularities = tuple(serialize.read(entry, "granularity") for entry in entries["granularity"])
            return cls(
                serialize.read(entries["criterion"], "criterion"),
                granularities[0] if len(granularities) == 1 else granularities,
                serialize.read(entries["allocation"], "allocation"),
                min_density=float(entries["min_density"]),
                round_to=int(entries["round_to"]),
                seed=int(entries["seed"]),
                equal_widths=bool(entries.get("equal_widths", False)),
                min_units=int(entries.get("min_units", 1)),
            )
        except (KeyError, TypeError) as error:
            raise BadInput("this does not describe a recipe", f"{type(error).__name__}: {error}") from error


_NAMES_OF_0_1 = {"floor": "min_density", "align": "round_to", "even": "equal_widths", "least": "min_units"}


def current_names(described: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain data with present names in place of those of version 0.1."""
    return {_NAMES_OF_0_1.get(name, name): value for name, value in described.items()}
