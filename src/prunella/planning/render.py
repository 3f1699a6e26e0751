"""A plan as text: rows, totals, remarks, and the frozen axes with reasons."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from prunella.errors import printable
from prunella.graph.data import Frozen, Graph, UnreadSize
from prunella.measure.text import byte_size, change, duration, percent, short_count, table
from prunella.planning.accounting import Amount, Row, empty
from prunella.planning.diagnostics import offer
from prunella.types import Keep


def render(rows: Sequence[Row], before: Amount, after: Amount, notes: Sequence[str], frozen: Iterable[Frozen]) -> str:
    """Rows by group, totals, notes, and what is frozen and why."""
    cells = [
        (
            row.name,
            row.kind,
            f"{row.kept}/{row.total}",
            f"in {row.counted_with}"
            if row.counted_with
            else change(short_count(row.params_before), short_count(row.params_after)),
            "" if row.counted_with else change(short_count(row.macs_before), short_count(row.macs_after)),
        )
        for row in rows
    ]
    lines = table(("name", "kind", "kept", "params", "MACs"), cells, right=(2, 3, 4))
    return "\n".join([lines, "", *_totals(before, after), *map(_one_line, (*notes, *frozen_lines(frozen)))])


def _one_line(text: str) -> str:
    return printable(text.replace("\n", " "))


def remarks_of(graph: Graph, limit: int = 3) -> list[str]:
    """Properties of some parameters, one line each: tied, read in several places, not trained, not used.

    A last line says why the training mode was not tried, if the source of the model has branches for it.
    """
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
    remarks = [f"{text}: {_listed(names, limit)}" for text, names in lines.items() if names]
    remarks += [f"not tried in training mode: {graph.untried}"] if graph.untried else []
    return [*remarks, *_branch_remarks(graph, limit)]


def _branch_remarks(graph: Graph, limit: int) -> list[str]:
    """The branches on values with one untraced side, and why."""
    one_sided = dict[str, list[str]]()
    for branch in graph.branches:
        if branch.fault:
            one_sided.setdefault(branch.fault, []).append(branch.place)
    return [
        f"the graph was read on one side of a branch on values alone: {_listed(list(dict.fromkeys(places)), limit)}; "
        f"the other side was not traced: {fault}"
        for fault, places in one_sided.items()
    ]


def size_remarks(graph: Graph, keep: Keep, limit: int = 3) -> Iterator[str]:
    """`num_features of head: 64 -> 48, read by no traced operation`; and sizes with several possible new values."""
    owners: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
    for unread in graph.unread:
        new = unread.new(keep)
        if new != (unread.value,):
            owners.setdefault((_name(unread), unread.value, new), []).append(_owner(unread.owner))
    follow = [
        f"{name} of {_listed(modules, limit)}: {old} -> {new[0]}, read by no traced operation"
        for (name, old, new), modules in owners.items()
        if len(new) == 1
    ]
    stay = [
        f"{name} of {_listed(modules, limit)} is left at {old}, read by no traced operation: "
        f"its size may be {', '.join(map(str, new[:-1]))} or {new[-1]} now"
        for (name, old, new), modules in owners.items()
        if len(new) > 1
    ]
    yield from _first(follow, _LINES, "sizes, read by no traced operation, follow a cut")
    yield from _first(stay, _LINES, "sizes, read by no traced operation, are left as they are")


_LINES = 6
"""Most remarks of one kind on sizes; a model may store a size in every module."""


def _first(lines: Sequence[str], limit: int, text: str) -> list[str]:
    return [*lines[:limit], *([f"and {len(lines) - limit} more {text}"] if len(lines) > limit else [])]


def _name(unread: UnreadSize) -> str:
    return unread.name if unread.index < 0 else f"{unread.name}[{unread.index}]"


def _owner(owner: str) -> str:
    path, _, config = owner.partition(":")
    return " of ".join(part for part in (config, path) if part) or "the model"


def emptied(rows: Sequence[Row], limit: int = 5) -> list[str]:
    """A line that names the layers that a mask empties, if there are any."""
    names = empty(rows)
    return [f"collapsed, nothing of these layers is left: {_listed(names, limit)}"] if names else []


def _listed(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def frozen_lines(frozen: Iterable[Frozen], limit: int = 8) -> list[str]:
    """The frozen parts, grouped by reason, the most frequent first."""
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


def _totals(before: Amount, after: Amount) -> list[str]:
    pairs = [
        ("params", before.params, after.params, short_count),
        ("MACs", before.macs, after.macs, short_count),
        ("bytes", before.bytes, after.bytes, byte_size),
        ("latency", before.latency / 1e3, after.latency / 1e3, duration),
    ]
    rows = [
        (label, form(old), "->", form(new), f"({percent(new / old)} kept)") for label, old, new, form in pairs if old
    ]
    return table((), rows, right=(1,)).split("\n")
