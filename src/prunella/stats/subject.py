"""The object of statistics: a model with groups or layers to score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prunella.graph.data import Graph, Group, Layer


@dataclass(frozen=True)
class Subject:
    """A model, its graph, and the groups (structured pruning) or layers (masks) to score; one of them is empty.

    inputs: the example batch, for statistics without data.
    """

    model: nn.Module
    graph: Graph
    groups: tuple[Group, ...] = ()
    layers: tuple[Layer, ...] = ()
    inputs: Any = None

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by the name of its entity."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name, entity in self.graph.entities.items() if entity.parameter}

    @cached_property
    def layer_of(self) -> dict[str, Layer]:
        """The layer of each weight, by entity; a weight of several layers counts once."""
        return {layer.entity: layer for layer in reversed(self.graph.layers)}

    @cached_property
    def scored(self) -> tuple[str, ...]:
        """Entities with statistics: floating-point parameters of the groups or layers."""
        names = [m.entity for group in self.groups for m in group.members if m.role != "stat"]
        names += [layer.entity for layer in self.layers]
        return tuple(dict.fromkeys(n for n in names if self._real(n)))

    def _real(self, name: str) -> bool:
        return name in self.parameters and self.parameters[name].is_floating_point()


def first_seen(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """One layer for each weight, in order."""
    return tuple({layer.entity: layer for layer in reversed(tuple(layers))}.values())[::-1]
