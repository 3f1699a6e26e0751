"""From the record of a run to groups of units: which slices of which parameters must go together.

1. Equal atoms are joined (connected components). 2. Each conjunction (a view that factors an axis) is resolved: one
factor may lose positions, the others stay; a factor that is frozen already decides, then the one that is the batch of
a product (attention heads), then the longer one. 3. What remains and is not frozen falls into units; units that cut
the same axes of the same parameters in the same measure form a group. 4. Sizes kept as attributes are solved, and
each group is tried: one unit is removed, and every size in the source that would not follow freezes the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from prunella.errors import BadInput, PruningError
from prunella.graph.axes import And, Dim, Reason
from prunella.graph.ops import apply_rule
from prunella.graph.provenance import Attr, Expression, Shape, evaluate, leaves
from prunella.graph.structure import Attribute, Cost, Entity, Extent, Frozen, Graph, Group, Ints, Keep, Layer, Member
from prunella.graph.trace import Axis, Link, Trace, Work, trace

Mark = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def couple(model: nn.Module, inputs: Any) -> Graph:
    """The coupling graph of a model, from one run on `inputs` (a batch as `prunella.forward.forward` takes it).

    The model is left as it was. Raises `BadInput` if it does not run on the inputs.
    """
    try:
        record = trace(model, inputs, apply_rule)
    except PruningError:
        raise
    except Exception as error:
        raise BadInput(
            "the model does not run on the example inputs",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            "check the shape and the type of the inputs",
        ) from error
    for work in record.work:
        for dim, _ in work.dims:
            record.ledger.single(dim)
    return _Solver(record).graph()


def cuts(graph: Graph, keep: Keep) -> dict[str, dict[int, Tensor]]:
    """Entity -> axis -> positions that remain (int64, ascending), for each axis that loses any."""
    gone: dict[tuple[str, int], list[Ints]] = {}
    for group in graph.groups:
        mask = keep.get(group.name)
        if mask is None or bool(mask.all()):
            continue
        lost = ~mask.numpy()
        for member in group.members:
            gone.setdefault((member.entity, member.axis), []).append(member.index[lost[member.unit]])
    result: dict[str, dict[int, Tensor]] = {}
    for (entity, axis), parts in gone.items():
        stays = np.ones(graph.entities[entity].shape[axis], dtype=bool)
        stays[np.concatenate(parts)] = False
        result.setdefault(entity, {})[axis] = torch.from_numpy(np.flatnonzero(stays))
    return result


def attributes(graph: Graph, keep: Keep) -> dict[tuple[str, str], int]:
    """(owner, name) -> new value, for each size attribute that changes."""
    new = {(a.owner, a.name): a.new(keep) for a in graph.attributes}
    return {key: value for key, value in new.items() if value != _old(graph, key)}


def _old(graph: Graph, key: tuple[str, str]) -> int:
    return next(a.value for a in graph.attributes if (a.owner, a.name) == key)


@dataclass(frozen=True, eq=False)
class _Solved:
    """An attribute with the link that defines it."""

    attr: Attr
    link: Link
    factor: int
    divisor: int


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Component -> number of its group (-1 if it has none) and of its unit."""

    groups: tuple[Group, ...]
    group: Ints
    unit: Ints


class _Solver:
    """Resolves one record. Lives for one call of `couple`."""

    def __init__(self, record: Trace) -> None:
        self.record, self.ledger = record, record.ledger
        self.pending: list[And] = list(self.ledger.ands)
        self.reasons: list[tuple[Ints, Reason]] = []

    # -- equations ----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Connected components of equal atoms, and which of them are frozen."""
        a = np.concatenate([np.zeros(1, np.int64), *(e[0] for e in self.ledger.edges)])
        b = np.concatenate([np.zeros(1, np.int64), *(e[1] for e in self.ledger.edges)])
        n = self.ledger.size
        self.part = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n)), False)[1]
        self.part = self.part.astype(np.int64)
        self.fixed: Mark = np.zeros(int(self.part.max()) + 1, dtype=bool)
        self.fixed[self.part[0]] = True
        for atoms, _ in self.ledger.frozen:
            self.fixed[self.part[atoms]] = True

    def stays(self, atoms: Ints) -> Mark:
        """Which atoms are frozen."""
        found: Mark = self.fixed[self.part[atoms]]
        return found

    def resolve(self) -> None:
        """Decide every conjunction."""
        self.join()
        while self.pending:
            if not self._forced():
                self._choose()
            self.join()

    def _forced(self) -> bool:
        changed = False
        for node in list(self.pending):
            whole = self.stays(node.whole)
            if any((whole & ~self.stays(f)).any() for f in node.factors):
                for factor in node.factors:
                    self._freeze(factor[whole], self.reason(node.whole[whole]))
                changed = True
            live = [f for f in node.factors if not self.stays(f).all()]
            if len(live) <= 1:
                self.pending.remove(node)
                changed = True
                if live:
                    self.ledger.edges.append((node.whole, live[0]))
                else:
                    self._freeze(node.whole, self.reason(np.concatenate(node.factors)))
        return changed

    def _choose(self) -> None:
        batch = np.zeros_like(self.fixed)
        for atoms in self.ledger.batched:
            batch[self.part[atoms]] = True
        heads = [n for n in self.pending if any(batch[self.part[f]].any() for f in n.factors)]
        node = (heads or self.pending)[0]
        live = [f for f in node.factors if not self.stays(f).all()]
        best = max(live, key=lambda f: (bool(batch[self.part[f]].any()), len(np.unique(self.part[f]))))
        for factor in live:
            if factor is not best:
                self._freeze(factor, Reason("the other axis of the same view is the one that can go"))

    def _freeze(self, atoms: Ints, reason: Reason) -> None:
        if len(atoms):
            self.ledger.frozen.append((atoms, reason))
            self.fixed[self.part[atoms]] = True

    def reason(self, atoms: Ints) -> Reason:
        """Why these atoms stay: the first reason noted for any of their components."""
        wanted = np.zeros_like(self.fixed)
        wanted[self.part[atoms]] = True
        for frozen, reason in self.ledger.frozen:
            if wanted[self.part[frozen]].any():
                return reason
        return Reason("it meets a tensor that always stays" if wanted[self.part[0]] else "it always stays")

    # -- groups -------------------------------------------------------------------------------------------------------

    def positions(self) -> Iterator[tuple[str, int, Ints, Ints]]:
        """For each axis of each entity that was used: free positions and their components."""
        for name, dims in self.record.axes.items():
            for axis, dim in enumerate(dims):
                if dim:
                    part = self.part[dim[0]]
                    free = np.flatnonzero(~self.fixed[part])
                    if len(free):
                        yield name, axis, free, part[free]

    def groups(self) -> tuple[Group, ...]:
        """Units that cut the same axes in the same measure."""
        where = {(name, axis): (index, part) for name, axis, index, part in self.positions()}
        keys = list(where)
        if not keys:
            return ()
        counted = [np.unique(part, return_counts=True) for _, part in where.values()]
        unit = np.concatenate([u for u, _ in counted])
        rows = np.concatenate([np.stack([np.full(len(n), k), n]) for k, (_, n) in enumerate(counted)], axis=1).T
        order = np.argsort(unit, kind="stable")
        unit, rows = unit[order], np.ascontiguousarray(rows[order])
        alike: dict[bytes, tuple[Ints, list[int]]] = {}
        starts = np.flatnonzero(np.diff(unit, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(unit)], strict=True):
            alike.setdefault(rows[start:stop].tobytes(), (rows[start:stop], []))[1].append(int(unit[start]))
        heads = {int(p) for atoms in self.ledger.batched for p in np.unique(self.part[atoms])}
        made = []
        for found, units in alike.values():
            axes = [keys[k] for k in found[:, 0]]
            if any(self.record.roles.get(axis) in {"out", "in"} for axis in axes):
                made.append(self._group(axes, units, where, heads))
        return tuple(_unique_names(made))

    def _group(
        self, axes: list[Axis], units: list[int], where: Mapping[Axis, tuple[Ints, Ints]], heads: set[int]
    ) -> Group:
        number = np.full(len(self.fixed), -1, dtype=np.int64)
        order = self._order(axes, units, where)
        number[order] = np.arange(len(order))
        members = []
        for name, axis in axes:
            index, part = where[name, axis]
            mine = number[part] >= 0
            role = self.record.roles.get((name, axis), "other")
            members.append(Member(name, axis, index[mine], number[part[mine]], role))
        first = next((m for m in members if m.role == "out"), members[0])
        name = first.entity.removesuffix(".weight")
        return Group(name, len(units), "head" if units[0] in heads else "channel", tuple(members))

    def _order(self, axes: list[Axis], units: list[int], where: Mapping[Axis, tuple[Ints, Ints]]) -> Ints:
        """Units by their first position on the axis that produces them."""
        best = next((a for a in axes if self.record.roles.get(a) == "out"), axes[0])
        found, first = np.unique(where[best][1], return_index=True)
        mine = np.isin(found, units)
        return np.asarray(found[mine][np.argsort(first[mine])], dtype=np.int64)

    # -- sizes in the source ------------------------------------------------------------------------------------------

    def size(self, dim: Dim, gone: Mark) -> int:
        """Positions of a dim that remain when the components `gone` are removed."""
        stays = np.ones(len(dim[0]), dtype=bool)
        for layer in dim:
            stays &= ~gone[self.part[layer]]
        return int(stays.sum())

    def touched(self, dim: Dim, gone: Mark) -> bool:
        """Whether a dim loses positions."""
        return any(gone[self.part[layer]].any() for layer in dim)

    def solve(self) -> dict[Attr, _Solved]:
        """The attributes that follow an axis: named alone as its size, or else needed for a size to follow."""
        solved: dict[Attr, _Solved] = {}
        free = [n for n in self.record.links if n.dim and not all(self.stays(layer).all() for layer in n.dim)]
        for link in free:
            if isinstance(link.expression, Attr):
                solved.setdefault(link.expression, _Solved(link.expression, link, 1, 1))
        for link in free:
            unknown = [e for e in leaves(link.expression) if isinstance(e, Attr) and e not in solved]
            if len(unknown) == 1 and self.follows(self._one(link.dim), solved, [link]) is link:
                divisor = int(np.gcd(unknown[0].value, link.length))
                factor, divisor = unknown[0].value // divisor, link.length // divisor
                solved[unknown[0]] = _Solved(unknown[0], link, factor, divisor)
        return solved

    def _one(self, dim: Dim) -> Mark:
        """A removal of the first component of a dim that may go."""
        gone = np.zeros_like(self.fixed)
        part = self.part[np.concatenate(dim)]
        gone[part[~self.fixed[part]][:1]] = True
        return gone

    def follows(self, gone: Mark, solved: Mapping[Attr, _Solved], links: Iterable[Link]) -> Link | None:
        """The first size in the source that is wrong once the components `gone` are removed."""

        def value(leaf: Attr | Shape) -> int:
            if isinstance(leaf, Shape):
                return self.size(leaf.dim, gone) if leaf.dim else leaf.value
            known = solved.get(leaf)
            return self.size(known.link.dim, gone) * known.factor // known.divisor if known else leaf.value

        for link in links:
            if _outcome(link.expression, value) != self.size(link.dim, gone):
                return link
        for attr, where in self.record.fixed:
            if value(attr) != attr.value:
                return Link(attr, (), attr.value, where)
        for choice, where in self.record.decisions:
            left, right = _outcome(choice.left, value), _outcome(choice.right, value)
            today = choice.operation(evaluate(choice.left, _today), evaluate(choice.right, _today))
            if left is None or right is None or choice.operation(left, right) != today:
                return Link(0, (), 0, where)
        return None

    def try_groups(self) -> bool:
        """Remove one unit, then every other unit, of each group; freeze the groups that the source cannot follow."""
        solved, frozen = self.solve(), False
        for group in self.groups():
            dims = [(self.part[self.record.axes[m.entity][m.axis][0][m.index]], m.unit) for m in group.members]
            for lost in ({0}, {group.size - 1}, set(range(0, group.size, 2)) if group.size > 1 else {0}):
                gone = np.zeros_like(self.fixed)
                for part, unit in dims:
                    gone[part[np.isin(unit, list(lost))]] = True
                links = [n for n in self.record.links if self._concerns(n, gone, solved)]
                wrong = self.follows(gone, solved, links)
                if wrong is not None:
                    self._freeze(np.flatnonzero(gone[self.part]), Reason(_unfollowed(wrong), wrong.where))
                    every = np.isin(self.part, np.concatenate([p for p, _ in dims]))
                    self._freeze(np.flatnonzero(every), Reason(_unfollowed(wrong), wrong.where))
                    frozen = True
                    break
        return frozen

    def _concerns(self, link: Link, gone: Mark, solved: Mapping[Attr, _Solved]) -> bool:
        if self.touched(link.dim, gone):
            return True
        for leaf in leaves(link.expression):
            dim = leaf.dim if isinstance(leaf, Shape) else solved[leaf].link.dim if leaf in solved else ()
            if dim and self.touched(dim, gone):
                return True
        return False

    # -- the result ---------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """Resolve, group, try, and write it down in names."""
        self.resolve()
        while self.try_groups():
            self.join()
        groups = self.groups()
        units = self._number(groups)
        record = self.record
        layers = _layers(record.work)
        costs = tuple(self._cost(work, units) for work in record.work if len(work.dims) > 1)
        extents = {name: self._extents(name, units) for name in record.tensors}
        return Graph(
            entities={name: _entity(record, name) for name in record.tensors},
            groups=groups,
            frozen=tuple(self._frozen()),
            layers=tuple(_with_macs(layers, costs)),
            costs=costs,
            extents=extents,
            attributes=self._attributes(units),
            uncounted=dict(sorted(record.uncounted.items())),
            unused=tuple(name for name in record.tensors if name not in record.axes and name in record.parameters),
        )

    def _number(self, groups: tuple[Group, ...]) -> _Numbers:
        group = np.full(len(self.fixed), -1, dtype=np.int64)
        unit = np.zeros(len(self.fixed), dtype=np.int64)
        for k, found in enumerate(groups):
            member = found.members[0]
            part = self.part[self.record.axes[member.entity][member.axis][0][member.index]]
            group[part], unit[part] = k, member.unit
        return _Numbers(groups, group, unit)

    def _extent(self, dim: Dim, length: int, numbers: _Numbers) -> Extent:
        live = [layer for layer in dim if not self.stays(layer).all()]
        if not live:
            return Extent(length)
        part = self.part[live[0]]
        group, unit = numbers.group[part], numbers.unit[part]
        counts = []
        for k in np.unique(group[group >= 0]):
            found = numbers.groups[k]
            counts.append((found.name, np.bincount(unit[group == k], minlength=found.size).astype(np.int64)))
        return Extent(int((group < 0).sum()), tuple(counts))

    def _extents(self, name: str, numbers: _Numbers) -> tuple[Extent, ...]:
        shape = self.record.tensors[name].shape
        dims = self.record.axes.get(name, ((),) * len(shape))
        return tuple(self._extent(dim, int(size), numbers) for dim, size in zip(dims, shape, strict=True))

    def _cost(self, work: Work, numbers: _Numbers) -> Cost:
        extents = tuple(self._extent(dim, size, numbers) for dim, size in work.dims)
        return Cost(work.op, work.module, work.use.entity if work.use else "", work.constant, extents)

    def _attributes(self, units: _Numbers) -> tuple[Attribute, ...]:
        made = []
        for attr, s in self.solve().items():
            extent = self._extent(s.link.dim, s.link.length, units)
            made.append(Attribute(attr.owner, attr.name, attr.value, extent, s.factor, s.divisor, s.link.where))
        return tuple(made)

    def _frozen(self) -> Iterator[Frozen]:
        for (name, axis), role in self.record.roles.items():
            dim = self.record.axes[name][axis]
            if role != "out" or not dim:
                continue
            stays = self.stays(dim[0])
            if stays.any():
                reason = self.reason(dim[0][stays])
                yield Frozen(name, axis, int(stays.sum()), reason.text, reason.where)


def _outcome(expression: Expression, value: Callable[[Attr | Shape], int]) -> int | None:
    """The value of an expression, None where it divides by zero."""
    try:
        return evaluate(expression, value)
    except ZeroDivisionError:
        return None


def _today(leaf: Attr | Shape) -> int:
    return leaf.value


def _unfollowed(link: Link) -> str:
    if isinstance(link.expression, Attr) and not link.dim:
        return f"the size {link.expression.name} is used in a calculation"
    if not link.dim:
        return "the source decides by a size"
    return "a size in the source would not follow"


def _unique_names(groups: list[Group]) -> Iterator[Group]:
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if count == 1 else f"{group.name}#{count}"
        yield Group(name, group.size, group.kind, group.members)


def _entity(record: Trace, name: str) -> Entity:
    tensor = record.tensors[name]
    used = name in record.axes
    shape = tuple(int(n) for n in tensor.shape)
    return Entity(name, record.names[name], shape, tensor.element_size(), name in record.parameters, used)


def _layers(work: Iterable[Work]) -> Iterator[Layer]:
    seen: set[str] = set()
    for item in work:
        use = item.use
        if use is None or use.entity in seen:
            continue
        seen.add(use.entity)
        name = use.entity.removesuffix(".weight")
        op: Any = use.op
        yield Layer(name, use.entity, use.out_axis, use.in_axis, use.groups, op, use.bias, use.module)


def _with_macs(layers: Iterable[Layer], costs: tuple[Cost, ...]) -> Iterator[Layer]:
    macs: dict[str, float] = {}
    for cost in costs:
        macs[cost.layer] = macs.get(cost.layer, 0.0) + cost.macs({})
    for layer in layers:
        yield Layer(
            layer.name, layer.entity, layer.out_axis, layer.in_axis, layer.groups, layer.op, layer.bias, layer.module,
            macs.get(layer.entity, 0.0),
        )  # fmt: skip
