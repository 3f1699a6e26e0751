"""Sizes in the model's source: attributes that follow a cut, and groups that the source cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from prunella.graph.data import Group, Ints, ReasonKind
from prunella.graph.solve.equations import Equations, Mark
from prunella.graph.solve.joined import axes_of, joined
from prunella.graph.solve.labels import Dim, Reason
from prunella.graph.trace.recorder import Link, Trace
from prunella.graph.trace.tracked_int import Attr, Expression, Shape, SizeComparison, evaluate, leaves


@dataclass(frozen=True, eq=False)
class SolvedSizes:
    """An attribute with the link that defines it."""

    attr: Attr
    link: Link
    factor: int
    divisor: int


def size(equations: Equations, dim: Dim, removed: Mark) -> int:
    """Positions of a dim that are kept without the components `removed`."""
    kept = np.ones(len(dim[0]), dtype=bool)
    for layer in dim:
        kept &= ~removed[equations.part[layer]]
    return int(kept.sum())


def solve(equations: Equations, record: Trace) -> dict[Attr, SolvedSizes]:
    """The attributes that follow an axis: those equal to its size, or the only unknown attribute in a size."""
    solved: dict[Attr, SolvedSizes] = {}
    free = [n for n in record.links if n.dim and not all(equations.stays(layer).all() for layer in n.dim)]
    for link in free:
        if isinstance(link.expression, Attr):
            solved.setdefault(link.expression, SolvedSizes(link.expression, link, 1, 1))
    known = {*solved, *(attr for attr, _ in record.fixed)}
    known |= {link.expression for link in record.links if isinstance(link.expression, Attr)}
    for link in free:
        unknown = [e for e in leaves(link.expression) if isinstance(e, Attr) and e not in known]
        if len(unknown) == 1 and _alone(equations, record, link, solved) is link:
            divisor = int(np.gcd(unknown[0].value, link.length))
            factor, divisor = unknown[0].value // divisor, link.length // divisor
            solved[unknown[0]] = SolvedSizes(unknown[0], link, factor, divisor)
            known.add(unknown[0])
    return solved


def _alone(equations: Equations, record: Trace, link: Link, solved: Mapping[Attr, SolvedSizes]) -> Link | None:
    """What is wrong without one component of a link, if this is the only link."""
    removed = _one(equations, link.dim)
    return _unfollowed_by(equations, removed, solved, [link], record.fixed, record.decisions)


def _one(equations: Equations, dim: Dim) -> Mark:
    """The mark of the first component of a dim that is not frozen."""
    removed = np.zeros_like(equations.fixed)
    part = equations.part[np.concatenate(dim)]
    removed[part[~equations.fixed[part]][:1]] = True
    return removed


def _unfollowed_by(
    equations: Equations,
    removed: Mark,
    solved: Mapping[Attr, SolvedSizes],
    links: Iterable[Link],
    fixed: Iterable[tuple[Attr, str]],
    decisions: Iterable[tuple[SizeComparison, str]],
) -> Link | None:
    """The first size in the source that is wrong after the removal of the components `removed`."""

    def value(leaf: Attr | Shape) -> int:
        if isinstance(leaf, Shape):
            return size(equations, leaf.dim, removed) if leaf.dim else leaf.value
        known = solved.get(leaf)
        return size(equations, known.link.dim, removed) * known.factor // known.divisor if known else leaf.value

    for link in links:
        remains = size(equations, link.dim, removed)
        if outcome(link.expression, value) != remains or (remains == 0 and link.length):
            return link
    for attr, where in fixed:
        if value(attr) != attr.value:
            return Link(attr, (), attr.value, where)
    for choice, where in decisions:
        left, right = outcome(choice.left, value), outcome(choice.right, value)
        today = choice.operation(evaluate(choice.left, _today), evaluate(choice.right, _today))
        if left is None or right is None or choice.operation(left, right) != today:
            return Link(0, (), 0, where)
    return None


def freeze_unfollowed(equations: Equations, record: Trace, groups: Sequence[Group]) -> bool:
    """Try removals of units of each group. Join groups that the source follows only together, and freeze the others."""
    solved, changed = solve(equations, record), False
    concerned = _Concerned(equations, record, solved)

    def wrong(removed: Mark) -> Link | None:
        return _unfollowed_by(equations, removed, solved, *concerned.by(removed))

    axes = {attr: size.link.dim for attr, size in solved.items()}
    for group in groups:
        dims = [(equations.part[record.axes[m.entity][m.axis][0][m.index]], m.unit) for m in group.members]
        without = partial(_without, equations, dims)
        for lost in _trials(group.size, group.min_units):
            removed = without(lost)
            at_fault = wrong(removed)
            if at_fault is not None:
                if joined(equations, record, groups, group, wrong, _trials, partial(axes_of, solved=axes)):
                    return True
                least = _least(group, at_fault, lambda lost: wrong(without(lost)))  # noqa: B023 (it is called here)
                if least:
                    first = group.members[0]
                    layer = record.axes[first.entity][first.axis][0][first.index]
                    equations.ledger.min_units.append((layer, least))
                    return True
                equations.freeze(np.flatnonzero(removed[equations.part]), _unfollowed(at_fault))
                every = np.isin(equations.part, np.concatenate([p for p, _ in dims]))
                equations.freeze(np.flatnonzero(every), _unfollowed(at_fault))
                changed = True
                break
    return changed


def _without(equations: Equations, dims: Sequence[tuple[Ints, Ints]], lost: set[int]) -> Mark:
    """The components of these units. dims: components of each axis of a group, and their units."""
    removed = np.zeros_like(equations.fixed)
    for part, unit in dims:
        removed[part[np.isin(unit, list(lost))]] = True
    return removed


def _trials(size: int, least: int = 1) -> list[set[int]]:
    """Units to remove: the first, the last, every other one, and all but the fewest."""
    if size <= least:
        return [{0}] if least < 2 else []
    return [{0}, {size - 1}, set(range(0, size, 2)) if size >= 2 * least else {0}, *_all_but(size, least)]


def _all_but(size: int, count: int) -> list[set[int]]:
    return [set(range(count, size)), set(range(size - count))]


def _least(group: Group, at_fault: Link, wrong: Callable[[set[int]], Link | None]) -> int:
    """The fewest units with which the source decides as it does with all of them; 0 if a few less are wrong already.

    Such as `heads == 1`, which asks for another way with a single head.
    """
    if at_fault.dim or isinstance(at_fault.expression, Attr) or any(map(wrong, _trials(group.size)[:3])):
        return 0
    for count in range(group.min_units + 1, group.size // 2 + 1):
        if not any(map(wrong, _all_but(group.size, count))):
            return count
    return 0


class _Concerned:
    """The links, the fixed attributes and the decisions of a run, by the components of which their sizes are.

    What has none of the removed components is as it is today, and need not be looked at.
    """

    def __init__(self, equations: Equations, record: Trace, solved: Mapping[Attr, SolvedSizes]) -> None:
        def of(leaf: Attr | Shape) -> Dim:
            return leaf.dim if isinstance(leaf, Shape) else solved[leaf].link.dim if leaf in solved else ()

        self._links = _Parts(equations, record.links, [[n.dim, *map(of, leaves(n.expression))] for n in record.links])
        self._fixed = _Parts(equations, record.fixed, [[of(attr)] for attr, _ in record.fixed])
        choices = [list(map(of, leaves(choice))) for choice, _ in record.decisions]
        self._decisions = _Parts(equations, record.decisions, choices)

    def by(self, removed: Mark) -> tuple[list[Any], list[Any], list[Any]]:
        """What the removed components concern: links, fixed attributes and decisions."""
        return self._links.by(removed), self._fixed.by(removed), self._decisions.by(removed)


class _Parts:
    """Entries with the components of their dims, one after the other."""

    def __init__(self, equations: Equations, entries: Sequence[Any], dims: Sequence[Sequence[Dim]]) -> None:
        parts = [[equations.part[layer] for dim in near for layer in dim] for near in dims]
        sized = [(entry, np.unique(np.concatenate(near))) for entry, near in zip(entries, parts, strict=True) if near]
        self._entries = [entry for entry, near in sized if len(near)]
        lengths = [len(near) for _, near in sized if len(near)]
        self._parts = np.concatenate([near for _, near in sized]) if lengths else np.zeros(0, np.int64)
        self._starts = np.cumsum([0, *lengths[:-1]])

    def by(self, removed: Mark) -> list[Any]:
        """The entries with a component that is removed."""
        if not self._entries:
            return []
        touched = np.logical_or.reduceat(removed[self._parts], self._starts)
        return [self._entries[k] for k in np.flatnonzero(touched)]


def outcome(expression: Expression, value: Callable[[Attr | Shape], int]) -> Any:
    """The value of an expression, None where it divides by zero."""
    try:
        return evaluate(expression, value)
    except ZeroDivisionError:
        return None


def _today(leaf: Attr | Shape) -> int:
    return leaf.value


def _unfollowed(link: Link) -> Reason:
    if isinstance(link.expression, Attr) and not link.dim:
        text = f"the size {link.expression.name} is used in a calculation"
        return Reason(text, link.where, kind=ReasonKind.SOURCE)
    if not link.dim:
        return Reason("a branch of the source depends on a size", link.where, kind=ReasonKind.DECISION)
    return Reason(link.text or "a size in the source would not follow", link.where, kind=ReasonKind.SOURCE)
