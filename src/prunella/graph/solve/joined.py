"""Groups that can lose units only together because of a size in the source, such as heads and the stream they read.

In `x.view(b, n, heads, width // heads)` neither a head nor a position of the stream can be removed alone: the quotient
would change. It does not change if both lose the same fraction. One unit of each dependent group is then removed
together with a block of positions of the stream: unit `k` with block `k`, since any pairing gives the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunella.graph.data import Group, Ints
from prunella.graph.solve.equations import Equations, Mark
from prunella.graph.solve.labels import Dim
from prunella.graph.trace.recorder import Link, Trace
from prunella.graph.trace.tracked_int import Shape, leaves

Wrong = Callable[[Mark], Link | None]
"""The first size in the source that is wrong after the removal of these components."""
Trials = Callable[[int], list[set[int]]]


def joined(
    equations: Equations,
    record: Trace,
    groups: Sequence[Group],
    group: Group,
    wrong: Wrong,
    trials: Trials,
    dims_of: Callable[[Link], Iterable[Dim]],
) -> bool:
    """Join `group` with the groups that its sizes depend on, if the source then follows the cut; True if joined.

    wrong: gives the first size that does not follow a removal. trials: the removals to try. dims_of: all axes that a
    link depends on.
    """
    members, known = [group], {group.name}
    while True:
        count = math.gcd(*(member.size for member in members))
        if count < 2:
            return False
        atoms = [_atoms(record, member) for member in members]
        at_fault = _fault(equations, atoms, members, count, wrong, trials)
        if at_fault is None:
            break
        partners = [g for g in _concerned(equations, record, groups, dims_of(at_fault)) if g.name not in known]
        if not partners:
            return False
        members += partners
        known |= {partner.name for partner in partners}
    if len(members) < 2:
        return False
    for (positions, units), member in zip(atoms, members, strict=True):
        _join(equations, positions, units // (member.size // count), *_firsts(atoms[0], group.size // count))
    return True


def _atoms(record: Trace, group: Group) -> tuple[Ints, Ints]:
    """All atoms of a group, and the unit of each."""
    layers = [record.axes[m.entity][m.axis][0][m.index] for m in group.members]
    return np.concatenate(layers), np.concatenate([m.unit for m in group.members])


def _fault(
    equations: Equations,
    atoms: Sequence[tuple[Ints, Ints]],
    members: Sequence[Group],
    count: int,
    wrong: Wrong,
    trials: Trials,
) -> Link | None:
    """The first size that does not follow if all members lose the same blocks of units."""
    for lost in trials(count):
        removed = np.zeros_like(equations.fixed)
        for (positions, units), member in zip(atoms, members, strict=True):
            chosen = np.isin(units // (member.size // count), list(lost))
            removed[equations.part[positions[chosen]]] = True
        link = wrong(removed)
        if link is not None:
            return link
    return None


def _concerned(equations: Equations, record: Trace, groups: Sequence[Group], dims: Iterable[Dim]) -> list[Group]:
    """The groups with a unit on one of these axes."""
    parts = np.unique(np.concatenate([np.zeros(0, np.int64), *(equations.part[layer] for d in dims for layer in d)]))
    parts = parts[~equations.fixed[parts]]
    return [group for group in groups if np.isin(equations.part[_atoms(record, group)[0]], parts).any()]


def _firsts(first: tuple[Ints, Ints], size: int) -> tuple[Ints, Ints]:
    """One atom of each block of the first group, and the numbers of the blocks."""
    positions, units = first
    blocks, at = np.unique(units // size, return_index=True)
    return positions[at], blocks


def _join(equations: Equations, positions: Ints, block: Ints, firsts: Ints, blocks: Ints) -> None:
    equations.ledger.edges.append((positions, firsts[np.searchsorted(blocks, block)]))


def axes_of(link: Link, solved: Mapping[Any, Dim]) -> Iterable[Dim]:
    """The axis of a link, and all axes whose sizes its expression reads."""
    yield link.dim
    for leaf in leaves(link.expression):
        yield leaf.dim if isinstance(leaf, Shape) else solved.get(leaf, ())
