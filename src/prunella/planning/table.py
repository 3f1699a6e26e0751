"""What a plan says in numbers: rows, totals, and both as an aligned table of text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunella.granularity import NM, Granularity
from prunella.graph.cut.macs import macs_by_layer
from prunella.graph.data import Frozen, Graph, Group, Layer
from prunella.planning.candidates import offer
from prunella.stats.subject import first_seen
from prunella.types import Mask


@dataclass(frozen=True)
class Amount:
    """What a model weighs: parameters, multiply-adds of one pass over the example, bytes, non-zero prunable weights.

    latency: milliseconds of one pass, where the target was a `Latency`; else 0.
    """

    params: float
    macs: float
    bytes: float
    weights: float
    latency: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of a plan: a group of units, or the mask of one weight."""

    name: str
    kind: str
    kept: int
    total: int
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float


# -- numbers ----------------------------------------------------------------------------------------------------


def amount(graph: Graph, keep: Mapping[str, Tensor]) -> Amount:
    """What the model weighs when only `keep` remains."""
    weights = sum(graph.numel(layer.entity, keep) for layer in first_seen(graph.layers))
    return Amount(float(graph.params(keep)), float(graph.macs(keep)), float(graph.bytes(keep)), float(weights))


def masked_amount(graph: Graph, rows: Sequence[Row]) -> Amount:
    """Weights under a mask count as nothing, except in bytes: zeros are stored."""
    dense = amount(graph, {})
    lost = sum(row.total - row.kept for row in rows)
    macs = sum(row.macs_before - row.macs_after for row in rows)
    return Amount(dense.params - lost, dense.macs - macs, dense.bytes, dense.weights - lost)


def group_rows(graph: Graph, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> tuple[Row, ...]:
    """Each parameter is counted with the first group that produces it, so that rows add up to at most the model."""
    owner: dict[str, str] = {}
    for group in groups:
        for member in group.members:
            if member.role != "in" and graph.entities[member.entity].parameter:
                owner.setdefault(member.entity, group.name)
    entity = {name: layer.entity for layer in graph.layers for name in (layer.name, layer.entity)}
    return tuple(_group_row(graph, group, keep, owner, entity) for group in groups)


def _group_row(
    graph: Graph, group: Group, keep: Mapping[str, Tensor], owner: Mapping[str, str], entity: Mapping[str, str]
) -> Row:
    mine = {name for name, group_name in owner.items() if group_name == group.name}
    costs = [cost for cost in graph.costs if entity.get(cost.layer) in mine]
    return Row(
        name=group.name,
        kind=group.kind,
        kept=int(keep[group.name].sum()),
        total=group.size,
        params_before=sum(graph.numel(name) for name in mine),
        params_after=sum(graph.numel(name, keep) for name in mine),
        macs_before=sum(cost.macs({}) for cost in costs),
        macs_after=sum(cost.macs(keep) for cost in costs),
    )


def pattern_name(pattern: Granularity) -> str:
    """`2:4`, `block`, `element`."""
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else type(pattern).__name__.lower()


def mask_rows(graph: Graph, layers: Sequence[Layer], masks: Mapping[str, Mask], kind: str) -> tuple[Row, ...]:
    """One row for each masked weight."""
    macs = macs_by_layer(graph)
    rows = []
    for layer in layers:
        kept, total, cost = int(masks[layer.entity].sum()), masks[layer.entity].numel(), macs.get(layer.entity, 0.0)
        rows.append(Row(layer.name, kind, kept, total, total, kept, cost, cost * kept / total))
    return tuple(rows)


# -- text ----------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], before: Amount, after: Amount, notes: Sequence[str], frozen: Iterable[Frozen]) -> str:
    """Rows by group, totals, notes, and what is frozen and why."""
    cells = [
        (
            row.name,
            row.kind,
            f"{row.kept}/{row.total}",
            _change(row.params_before, row.params_after),
            _change(row.macs_before, row.macs_after),
        )
        for row in rows
    ]
    lines = align([("name", "kind", "kept", "params", "MACs"), *cells])
    return "\n".join(line.rstrip() for line in [*lines, "", *_totals(before, after), *notes, *frozen_lines(frozen)])


def remarks(graph: Graph, limit: int = 3) -> list[str]:
    """What holds for some of the parameters, one line each: tied, read in several places, not trained, not used."""
    parameters = [entity for entity in graph.entities.values() if entity.parameter]
    tied = [" = ".join(entity.names) for entity in parameters if len(entity.names) > 1]
    reads = Counter(cost.layer for cost in graph.costs if cost.layer)
    shared = [f"{name} ({count} times)" for name, count in reads.items() if count > 1]
    fixed = [entity.name for entity in parameters if not entity.trainable]
    lines = {
        "tied, cut as one": tied,
        "used several times, cut as one": shared,
        "not trained (requires_grad=False), cut like any other": fixed,
        "not used on these inputs, left whole": list(graph.unused),
    }
    return [f"{text}: {_listed(names, limit)}" for text, names in lines.items() if names]


def emptied(rows: Sequence[Row], limit: int = 5) -> list[str]:
    """A line that names the layers of which a mask keeps nothing, if there are any."""
    names = empty(rows)
    return [f"collapsed, nothing of these layers is left: {_listed(names, limit)}"] if names else []


def empty(rows: Sequence[Row]) -> list[str]:
    """Names of layers of which nothing is kept."""
    return [row.name for row in rows if row.kept == 0 and row.total]


def _listed(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def short(number: float) -> str:
    """1234567 -> `1.23M`."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 999.5 * size else f"{number / size:.0f}{suffix}"
    return f"{number:.4g}"


def frozen_lines(frozen: Iterable[Frozen], limit: int = 8) -> list[str]:
    """What may not be pruned, grouped by reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Frozen]] = defaultdict(list)
    for entry in frozen:
        groups[entry.reason, entry.where].append(entry)
    if not groups:
        return []
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    count = sum(len(entries) for entries in groups.values())
    lines = [f"not pruned: {count} {'axis' if count == 1 else 'axes'}"]
    for (reason, where), entries in ranked[:limit]:
        names = ", ".join(dict.fromkeys(entry.entity for entry in entries[:3])) + (", ..." if len(entries) > 3 else "")
        lines.append(f"  {len(entries)} x {reason}{f' ({where})' if where else ''}: {names}")
    lines += [f"  and {len(ranked) - limit} other reasons"] if len(ranked) > limit else []
    helps = offer(entry for entries in groups.values() for entry in entries)
    return lines + ([f"  {helps}"] if helps else [])


def _change(before: float, after: float) -> str:
    return f"{short(before)} -> {short(after)}" if before != after else short(before)


def _totals(before: Amount, after: Amount) -> list[str]:
    pairs = {
        "params": (before.params, after.params),
        "MACs": (before.macs, after.macs),
        "bytes": (before.bytes, after.bytes),
        "ms": (before.latency, after.latency),
    }
    return [
        f"{label:<7}{short(old):>8} -> {short(new):<8} ({new / old:.1%} stays)"
        for label, (old, new) in pairs.items()
        if old
    ]
