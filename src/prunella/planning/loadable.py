"""`loadable=`: only what another reader takes is chosen, and what that costs is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

from prunella.allocation import uniform
from prunella.errors import RequestError, TargetMissed
from prunella.measure.text import percent
from prunella.model.unwrap import unwrap
from prunella.planning.parts import readable_parts
from prunella.planning.recipe import Recipe
from prunella.types import Keep

if TYPE_CHECKING:
    from prunella.planning.request import GroupScores, Request

Loadable = Literal["transformers"]
"""Readers of whole models."""
KeptUnits = Callable[["Request"], Keep]


def read_by(recipe: Recipe, model: nn.Module, loadable: Loadable | None) -> Recipe:
    """The recipe under which a reader takes the result: equal groups lose the same share.

    Errors: RequestError for another reader, or another model.
    """
    if loadable is None:
        return recipe
    if loadable not in get_args(Loadable):
        why = f"it is one of {', '.join(get_args(Loadable))}"
        raise RequestError(f"loadable={loadable!r} names no reader", why, 'loadable="transformers"')
    if not readable_parts(unwrap(model)):
        why = f"{type(unwrap(model)).__name__} is not a model of transformers"
        raise RequestError("loadable='transformers' is for models of transformers", why, "leave loadable= out")
    return replace(recipe, equal_widths=True, allocation=uniform)


def costs_of_reading(
    free: Recipe, request: Request, scored: Sequence[GroupScores], keep: Keep, choose: KeptUnits
) -> Sequence[str]:
    """How much more of the scores goes than by the recipe as it was given, for the same target.

    free: that recipe, whose widths may differ from layer to layer.
    """
    try:
        other = choose(replace(request, recipe=free))
    except TargetMissed:
        return ()
    whole = [group.name for group, _ in scored if group.name not in keep and group.name in other]
    parts = [f"{percent(_lost(scored, keep))} of the scores go", f"{percent(_lost(scored, other))} with free widths"]
    parts += [f"{len(whole)} groups are kept dense for it"] if whole else []
    return (f"plain from_pretrained reads it: {', '.join(parts)}",)


def _lost(scored: Sequence[GroupScores], keep: Keep) -> float:
    """The removed part of all scores, each group's counted from its lowest."""
    pairs = [(keep.get(group.name), values.double() - min(0.0, float(values.min()))) for group, values in scored]
    total = sum(float(values.sum()) for _, values in pairs)
    return sum(_of(values, mask) for mask, values in pairs) / total if total else 0.0


def _of(values: Tensor, mask: Tensor | None) -> float:
    return 0.0 if mask is None else float(values[~mask].sum())
