"""How to prune: the parts that a plan is made of, as frozen data."""

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
from prunella.registry import serialize as provenance


@dataclass(frozen=True)
class Recipe:
    """How to prune: parts that mix freely. Knobs of the functions are bound by `functools.partial`.

    criterion: a function from statistics to scores (`prunella.criteria`, or your own).
    granularity: what a unit is; several structural ones, as `(Channel(), Head())`, share one ranking.
    allocation: how much each group gives (`prunella.allocation`).
    floor: fraction in [0, 1) of every group's units (of every layer's weights) that stays.
    align: widths of channel groups stay multiples of it, where they are not left whole; not for heads and masks.
    seed: of everything random. The same seed gives the same plan.
    least: units (weights) that stay in every group (layer) whatever the floor: 1, or 0 for masks that may empty layers.
    even: units whose keys are equal go together, so that equal groups under `uniform` stay equal, and a transformers
        model loads with plain `from_pretrained`; the target is then passed by up to one unit of every group.
    """

    criterion: Criterion = magnitude
    granularity: Granularity | tuple[Granularity, ...] = Channel()  # noqa: RUF009
    allocation: Allocation = uniform
    floor: float = 0.0
    align: int = 1
    seed: int = 0
    even: bool = False
    least: int = 1

    def __post_init__(self) -> None:
        check_function(self.criterion, "criterion")
        check_function(self.allocation, "allocation")
        check_granularity(self.grains)
        check_numbers(self.grains, self.floor, self.align, self.seed, self.least)

    @property
    def grains(self) -> tuple[Granularity, ...]:
        """The granularities as a tuple."""
        return self.granularity if isinstance(self.granularity, tuple) else (self.granularity,)

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, all knobs with their values; `Recipe.read` gives it back."""
        return {
            "criterion": provenance.describe(self.criterion),
            "granularity": [provenance.describe(grain) for grain in self.grains],
            "allocation": provenance.describe(self.allocation),
            "floor": self.floor,
            "align": self.align,
            "seed": self.seed,
            "even": self.even,
            "least": self.least,
        }

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Recipe:
        """The recipe that `describe` wrote. Errors: RequestError if it names functions that are not prunella's."""
        try:
            grains = tuple(provenance.read(entry, "granularity") for entry in described["granularity"])
            numbers = (
                float(described["floor"]),
                int(described["align"]),
                int(described["seed"]),
                bool(described.get("even", False)),
                int(described.get("least", 1)),
            )
            criterion, allocation = described["criterion"], described["allocation"]
        except (KeyError, TypeError) as error:
            raise BadInput("this does not describe a recipe", f"{type(error).__name__}: {error}") from error
        return cls(
            provenance.read(criterion, "criterion"),
            grains[0] if len(grains) == 1 else grains,
            provenance.read(allocation, "allocation"),
            *numbers,
        )
