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
from prunella.graph.trace.tracked_int import Attr, Expression, Shape, evaluate, leaves


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


def _touched(equations: Equations, dim: Dim, removed: Mark) -> bool:
    """Whether a dim loses positions."""
    return any(removed[equations.part[layer]].any() for layer in dim)


def solve(equations: Equations, record: Trace) -> dict[Attr, SolvedSizes]:
    """The attributes that follow an axis: those that are its size alone, or the only unknown attribute of a size."""
    solved: dict[Attr, SolvedSizes] = {}
    free = [n for n in record.links if n.dim and not all(equations.stays(layer).all() for layer in n.dim)]
    for link in free:
        if isinstance(link.expression, Attr):
            solved.setdefault(link.expression, SolvedSizes(link.expression, link, 1, 1))
    known = {*solved, *(attr for attr, _ in record.fixed)}
    known |= {link.expression for link in record.links if isinstance(link.expression, Attr)}
    for link in free:
        unknown = [e for e in leaves(link.expression) if isinstance(e, Attr) and e not in known]
        if len(unknown) == 1 and _unfollowed_by(equations, record, _one(equations, link.dim), solved, [link]) is link:
            divisor = int(np.gcd(unknown[0].value, link.length))
            factor, divisor = unknown[0].value // divisor, link.length // divisor
            solved[unknown[0]] = SolvedSizes(unknown[0], link, factor, divisor)
            known.add(unknown[0])
    return solved


def _one(equations: Equations, dim: Dim) -> Mark:
    """The mark of the first component of a dim that is not frozen."""
    removed = np.zeros_like(equations.fixed)
    part = equations.part[np.concatenate(dim)]
    removed[part[~equations.fixed[part]][:1]] = True
    return removed


def _unfollowed_by(
    equations: Equations, record: Trace, removed: Mark, solved: Mapping[Attr, SolvedSizes], links: Iterable[Link]
) -> Link | None:
    """The first size in the source that is wrong without the components `removed`."""

    def value(leaf: Attr | Shape) -> int:
        if isinstance(leaf, Shape):
            return size(equations, leaf.dim, removed) if leaf.dim else leaf.value
        known = solved.get(leaf)
        return size(equations, known.link.dim, removed) * known.factor // known.divisor if known else leaf.value

    for link in links:
        remains = size(equations, link.dim, removed)
        if outcome(link.expression, value) != remains or (remains == 0 and link.length):
            return link
    for attr, where in record.fixed:
        if value(attr) != attr.value:
            return Link(attr, (), attr.value, where)
    for choice, where in record.decisions:
        left, right = outcome(choice.left, value), outcome(choice.right, value)
        today = choice.operation(evaluate(choice.left, _today), evaluate(choice.right, _today))
        if left is None or right is None or choice.operation(left, right) != today:
            return Link(0, (), 0, where)
    return None


def freeze_unfollowed(equations: Equations, record: Trace, groups: Sequence[Group]) -> bool:
    """Try removals of units of each group. Join those that the source follows together, or freeze what it cannot."""
    solved, changed = solve(equations, record), False

    def wrong(removed: Mark) -> Link | None:
        links = [n for n in record.links if _concerns(equations, n, removed, solved)]
        return _unfollowed_by(equations, record, removed, solved, links)

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


def _concerns(equations: Equations, link: Link, removed: Mark, solved: Mapping[Attr, SolvedSizes]) -> bool:
    if _touched(equations, link.dim, removed):
        return True
    for leaf in leaves(link.expression):
        dim = leaf.dim if isinstance(leaf, Shape) else solved[leaf].link.dim if leaf in solved else ()
        if dim and _touched(equations, dim, removed):
            return True
    return False


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
        return Reason("the source decides by a size", link.where, kind=ReasonKind.DECISION)
    return Reason(link.text or "a size in the source would not follow", link.where, kind=ReasonKind.SOURCE)
