"""The numbers of a plan: a row for each group or mask, and totals for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunella.granularity import NM, Granularity
from prunella.graph.cut.macs import macs_by_layer
from prunella.graph.data import Graph, Group, Layer
from prunella.planning.coverage import weights_of
from prunella.stats.subject import first_seen
from prunella.types import Keep, Mask


@dataclass(frozen=True)
class Amount:
    """Cost of a model: parameters, multiply-adds of one pass over the example, bytes, nonzero prunable weights.

    latency: milliseconds of one pass, where the target was a `Latency`; else 0. model_weights: non-zero weights of the
    full model, prunable or not.
    """

    params: float
    macs: float
    bytes: float
    weights: float
    latency: float = 0.0
    model_weights: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of a plan: a group of units, or the mask of one weight.

    counted_with: the row that counts its weights, if another group cuts all of them too.
    """

    name: str
    kind: str
    kept: int
    total: int
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float
    counted_with: str = ""


def amount(graph: Graph, keep: Keep) -> Amount:
    """The size and cost of the model when only `keep` remains."""
    weights = sum(graph.numel(layer.entity, keep) for layer in first_seen(graph.layers))
    return Amount(
        params=float(graph.params(keep)),
        macs=float(graph.macs(keep)),
        bytes=float(graph.bytes(keep)),
        weights=float(weights),
        model_weights=model_weights(graph, keep),
    )


def model_weights(graph: Graph, keep: Keep) -> float:
    """Weights of the full model, prunable or not, when only `keep` remains."""
    return float(sum(graph.numel(name, keep) for name in weights_of(graph)))


def masked_amount(graph: Graph, rows: Sequence[Row], masks: Mapping[str, Mask]) -> Amount:
    """Size and cost of the model under masks: masked weights count only in bytes, since zeros are stored.

    Masks of parameters that do not multiply, such as a bias, remove parameters but no multiply-adds.
    """
    dense = amount(graph, {})
    layers = {layer.entity for layer in graph.layers}
    elsewhere = sum(int((~mask).sum()) for name, mask in masks.items() if name not in layers)
    lost = sum(row.total - row.kept for row in rows)
    macs = math.fsum(row.macs_before - row.macs_after for row in rows)
    return Amount(
        params=dense.params - lost - elsewhere,
        macs=dense.macs - macs,
        bytes=dense.bytes,
        weights=dense.weights - lost,
        model_weights=dense.model_weights - lost,
    )


def group_rows(graph: Graph, groups: Sequence[Group], keep: Keep) -> tuple[Row, ...]:
    """Each parameter is counted with the first group that produces it, so that rows add up to at most the model."""
    owner: dict[str, str] = {}
    for group in groups:
        for member in group.members:
            if member.role != "in" and graph.entities[member.entity].parameter:
                owner.setdefault(member.entity, group.name)
    entity = {name: layer.entity for layer in graph.layers for name in (layer.name, layer.entity)}
    return tuple(_group_row(graph, group, keep, owner, entity) for group in groups)


def _group_row(graph: Graph, group: Group, keep: Keep, owner: Mapping[str, str], entity: Mapping[str, str]) -> Row:
    mine = {name for name, group_name in owner.items() if group_name == group.name}
    costs = [cost for cost in graph.costs if entity.get(cost.layer) in mine]
    elsewhere = [owner[member.entity] for member in group.members if owner.get(member.entity, group.name) != group.name]
    return Row(
        name=group.name,
        kind=group.kind,
        kept=int(keep[group.name].sum()),
        total=group.size,
        params_before=sum(graph.numel(name) for name in mine),
        params_after=sum(graph.numel(name, keep) for name in mine),
        macs_before=sum(cost.macs({}) for cost in costs),
        macs_after=sum(cost.macs(keep) for cost in costs),
        counted_with="" if mine or not elsewhere else elsewhere[0],
    )


def pattern_name(pattern: Granularity) -> str:
    """`2:4`, `block`, `element`."""
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else type(pattern).__name__.lower()


Pattern = str | Callable[[Mask, Layer], str]
"""The pattern of all masks, or a function that names the pattern of each."""


def mask_rows(graph: Graph, masks: Mapping[str, Mask], pattern: Pattern) -> tuple[Row, ...]:
    """One row for each masked weight that multiplies, in the order of the layers."""
    macs = macs_by_layer(graph)
    rows = []
    for layer in first_seen(graph.layers):
        if layer.entity in masks:
            mask = masks[layer.entity]
            kept, total, cost = int(mask.sum()), mask.numel(), macs.get(layer.entity, 0.0)
            kind = pattern if isinstance(pattern, str) else pattern(mask, layer)
            rows.append(Row(layer.name, kind, kept, total, total, kept, cost, cost * kept / total))
    return tuple(rows)


def sparsity(rows: Sequence[Row]) -> float:
    """Fraction of the units (weights) that is removed; tokens count only if nothing else is pruned."""
    counted = [row for row in rows if row.kind != "vocabulary"] or rows
    total = sum(row.total for row in counted)
    return 1 - sum(row.kept for row in counted) / total if total else 0.0


def empty(rows: Sequence[Row]) -> list[str]:
    """Names of layers of which nothing is kept."""
    return [row.name for row in rows if row.kept == 0 and row.total]
