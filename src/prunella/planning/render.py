"""A plan as text: rows, totals, remarks, and what is not pruned and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from prunella.graph.data import Frozen, Graph
from prunella.planning.accounting import Amount, Row, empty
from prunella.planning.diagnostics import offer


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
    lines = columns([("name", "kind", "kept", "params", "MACs"), *cells])
    return "\n".join(line.rstrip() for line in [*lines, "", *_totals(before, after), *notes, *frozen_lines(frozen)])


def remarks_of(graph: Graph, limit: int = 3) -> list[str]:
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
        "not used on these inputs, kept dense": list(graph.unused),
    }
    return [f"{text}: {_listed(names, limit)}" for text, names in lines.items() if names]


def emptied(rows: Sequence[Row], limit: int = 5) -> list[str]:
    """A line that names the layers of which a mask keeps nothing, if there are any."""
    names = empty(rows)
    return [f"collapsed, nothing of these layers is left: {_listed(names, limit)}"] if names else []


def _listed(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
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
        f"{label:<7}{short(old):>8} -> {short(new):<8} ({new / old:.1%} kept)"
        for label, (old, new) in pairs.items()
        if old
    ]
