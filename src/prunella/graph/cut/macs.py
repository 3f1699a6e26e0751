"""Multiply-adds per weight, of the dense model and of its kept part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from prunella.graph.data import Cost, Graph, Layer
from prunella.types import Keep


def with_macs(layers: Iterable[Layer], costs: Iterable[Cost]) -> Iterator[Layer]:
    """The layers, each with the multiply-adds of its weight over all uses in the dense model."""
    macs: dict[str, float] = {}
    for cost in costs:
        macs[cost.layer] = macs.get(cost.layer, 0.0) + cost.macs({})
    for layer in layers:
        yield replace(layer, macs=macs.get(layer.entity, 0.0))


def macs_by_layer(graph: Graph, keep: Keep | None = None) -> dict[str, float]:
    """Entity of a layer -> multiply-adds of its weight over all uses in one pass, when only `keep` remains."""
    entity = {name: layer.entity for layer in graph.layers for name in (layer.name, layer.entity)}
    total: dict[str, float] = {}
    for cost in graph.costs:
        if cost.layer in entity:
            total[entity[cost.layer]] = total.get(entity[cost.layer], 0.0) + cost.macs(keep or {})
    return total


def macs_by_parameter(graph: Graph) -> dict[str, float]:
    """Parameter -> multiply-adds of the operations that multiply by it, layers or not; shared work counts for each."""
    total: dict[str, float] = {}
    for cost in graph.costs:
        for name in {cost.layer, *cost.reads} - {""}:
            total[name] = total.get(name, 0.0) + cost.macs({})
    return total
