"""From the record of a run to groups of units: which slices of which parameters are coupled.

1. Equal atoms are joined (connected components). 2. Each conjunction (a view that factors an axis) is resolved: one
factor may lose positions, the others are frozen. A frozen factor decides first, then the factor that is the batch of a
product (attention heads), then the longer factor. 3. The components that are not frozen are units. Units that cut the
same numbers of positions on the same axes form a group. Components that only norms, choices, lookups or outputs freeze
are released after the conjunctions; they form the groups of widths, experts and tokens. 4. Size attributes are solved,
and each group is tried: units are removed, and a size in the source that does not follow freezes the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported, PruningError, one_line, out_of_resources
from prunella.graph.cut.macs import with_macs
from prunella.graph.data import (
    Attribute,
    Cost,
    Entity,
    Extent,
    Frozen,
    Graph,
    Group,
    Ints,
    Kind,
    Layer,
    Member,
    Numbered,
    UnitCall,
    UnreadSize,
)
from prunella.graph.nested_sizes import sizes_in
from prunella.graph.rules import apply_rule
from prunella.graph.solve.equations import Equations
from prunella.graph.solve.labels import Dim, Reason
from prunella.graph.solve.other_branches import hints
from prunella.graph.solve.residual_blocks import add_stacks
from prunella.graph.solve.size_attributes import freeze_unfollowed, solve
from prunella.graph.solve.tokens import specials
from prunella.graph.solve.unread_sizes import never_read, same_sizes, unread_sizes
from prunella.graph.trace.recorder import Axis, Trace, Work
from prunella.graph.trace.tracked_int import holder
from prunella.graph.trace.training import sharing, trace_modes
from prunella.model.forward import forward
from prunella.model.state import untouched
from prunella.model.traceable import check_traceable
from prunella.model.unwrap import unwrap
from prunella.model.user_code import advice_on, told


def couple(
    model: nn.Module, inputs: Any, others: Sequence[Any] = (), arguments: Sequence[tuple[str, Any]] = ()
) -> Graph:
    """The coupling graph of a model, from one run on `inputs` (a batch as `prunella.model.forward.forward` takes it).

    others: further examples; what a run on one of them couples or freezes holds too. arguments: batches with
    other arguments, each with what it is in words; they are branches of the graph. The model does not change. Raises
    `BadInput` if it does not run on the inputs.
    """
    model = unwrap(model)
    check_traceable(model)
    try:
        record = trace_modes(model, inputs, apply_rule, others, arguments)
    except PruningError:
        raise
    except Exception as error:
        raise out_of_resources(error) or _not_run(model, inputs, error) from error
    for work in record.work:
        for dim, _ in work.dims:
            record.ledger.single(dim)
    graph = add_stacks(_graph(record, model), model, record.flow)
    unread = never_read(model, inputs, graph.unread)
    entries: list[Attribute | UnreadSize] = [*unread, *graph.attributes]
    places = {(entry.owner, entry.name) for entry in entries if entry.index >= 0}
    lists = {(owner, name): sizes_in(getattr(holder(model, owner), name)) for owner, name in places}
    graph = replace(graph, unread=unread, lists_of_sizes=lists)
    return replace(graph, specials=specials(model), untried=record.untried)


def _not_run(model: nn.Module, inputs: Any, error: Exception) -> PruningError:
    """The model's own error; or NotSupported, if the model runs only while it is not observed."""
    try:
        with untouched(model), torch.no_grad():
            forward(model, inputs)
    except Exception as plain:  # the source of the model may raise anything
        advice = advice_on(plain, "check the shape and the type of the inputs")
        todo = f"{advice}; model(inputs) raises the same without prunella"
        return BadInput("the model does not run on the example inputs", told(plain), todo)
    why = one_line(error)
    what = "the model runs on the example inputs, but not while its operations are observed"
    return NotSupported(what, why, "please report the model; --program, or as_program, may help")


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Component -> number of its group (-1 if there is none) and of its unit."""

    groups: tuple[Group, ...]
    group: Ints
    unit: Ints


def _graph(record: Trace, model: nn.Module) -> Graph:
    """Resolve, group and try the components, and describe the result by names."""
    equations = Equations(record.ledger)
    equations.lift()
    equations.relate([layer for layer, _ in record.tables], record.of_tokens)
    equations.refuse()
    groups = _groups(equations, record)
    while freeze_unfollowed(equations, record, groups):
        equations.join()
        groups = _groups(equations, record)
    numbers = _number(equations, record, groups)
    layers = _layers(record.work)
    costs = tuple(_cost(equations, work, numbers) for work in record.work)
    axes = tuple(_frozen(equations, record))
    extents = {name: _extents(equations, record, name, numbers) for name in record.tensors}
    attributes = _attributes(equations, record, numbers)
    attributes = (*attributes, *same_sizes(model, attributes))
    taken = [(attribute.owner, attribute.name) for attribute in attributes]
    return Graph(
        entities={name: _entity(record, name) for name in record.tensors},
        groups=groups,
        frozen=(*axes, *_kept_parameters(equations, record, groups, axes)),
        layers=tuple(with_macs(layers, costs)),
        costs=costs,
        extents=extents,
        attributes=attributes,
        uncounted={name: unknown.calls for name, unknown in sorted(record.uncounted.items())},
        hidden={name: tuple(sorted(unknown.reads)) for name, unknown in sorted(record.uncounted.items())},
        unregistered=dict(sorted(record.unregistered_work.items())),
        readers=record.readers,
        unused=tuple(
            n
            for n in record.tensors
            if n in record.parameters - record.axes.keys() - record.shared.keys() and _plain(record.tensors[n])
        ),
        runs=tuple(_runs(equations, record, numbers)),
        numbered=tuple(_numbered(equations, record, numbers)),
        hints=hints(record),
        branches=tuple(record.branches),
        shared={name: sharing(record, name) for name in sorted(record.shared)},
        unread=tuple(unread_sizes(model, record, lambda dim, size: _extent(equations, dim, size, numbers), taken)),
    )


def _numbered(equations: Equations, record: Trace, numbers: _Numbers) -> Iterator[Numbered]:
    for k, group in enumerate(numbers.groups):
        if group.kind == "vocabulary":
            input_numbers = [n for layer, n in record.tables if (numbers.group[equations.part[layer]] == k).any()]
            ends = [(n, a) for n, a, layer in record.outputs if (numbers.group[equations.part[layer]] == k).any()]
            yield Numbered(group.name, tuple(sorted(set(input_numbers))), tuple(dict.fromkeys(ends)))


def _runs(equations: Equations, record: Trace, numbers: _Numbers) -> Iterator[UnitCall]:
    for run in record.ledger.runs:
        part = equations.part[run.layer]
        for k in np.unique(numbers.group[part]):
            if k >= 0:
                unit = np.where(numbers.group[part] == k, numbers.unit[part], -1)
                group, calls = numbers.groups[k].name, record.call_counts[run.example, run.name]
                yield UnitCall(run.name, run.number, run.axis, group, unit, run.example, calls)


def _number(equations: Equations, record: Trace, groups: tuple[Group, ...]) -> _Numbers:
    group = np.full(len(equations.fixed), -1, dtype=np.int64)
    unit = np.zeros(len(equations.fixed), dtype=np.int64)
    for k, built in enumerate(groups):
        member = built.members[0]
        part = equations.part[record.axes[member.entity][member.axis][0][member.index]]
        group[part], unit[part] = k, member.unit
    return _Numbers(groups, group, unit)


def _extent(equations: Equations, dim: Dim, length: int, numbers: _Numbers) -> Extent:
    live = [layer for layer in dim if not equations.stays(layer).all()]
    if not live:
        return Extent(length)
    part = equations.part[live[0]]
    group, unit = numbers.group[part], numbers.unit[part]
    counts = []
    for k in np.unique(group[group >= 0]):
        owner = numbers.groups[k]
        counts.append((owner.name, np.bincount(unit[group == k], minlength=owner.size).astype(np.int64)))
    return Extent(int((group < 0).sum()), tuple(counts))


def _extents(equations: Equations, record: Trace, name: str, numbers: _Numbers) -> tuple[Extent, ...]:
    shape = record.tensors[name].shape
    dims = record.axes.get(name, ((),) * len(shape))
    return tuple(_extent(equations, dim, int(size), numbers) for dim, size in zip(dims, shape, strict=True))


def _cost(equations: Equations, work: Work, numbers: _Numbers) -> Cost:
    extents = tuple(_extent(equations, dim, size, numbers) for dim, size in work.dims)
    layer = work.use.entity if work.use else ""
    return Cost(work.op, work.module, layer, work.constant, extents, reads=work.reads)


def _attributes(equations: Equations, record: Trace, numbers: _Numbers) -> tuple[Attribute, ...]:
    solved_attributes = []
    for attr, s in solve(equations, record).items():
        extent = _extent(equations, s.link.dim, s.link.length, numbers)
        solved_attributes.append(
            Attribute(attr.owner, attr.name, attr.value, extent, s.factor, s.divisor, s.link.where, attr.index)
        )
    return tuple(solved_attributes)


def _frozen(equations: Equations, record: Trace) -> Iterator[Frozen]:
    for (name, axis), role in record.roles.items():
        dim = record.axes[name][axis]
        if role != "out" or not dim:
            continue
        kept = equations.stays(dim[0])
        if kept.any():
            reason = equations.reason(dim[0][kept])
            where = reason.where or record.reader(name)[1]
            yield Frozen(name, axis, int(kept.sum()), reason.text, where, reason.kind)


def _kept_parameters(
    equations: Equations, record: Trace, groups: Iterable[Group], axes: Iterable[Frozen]
) -> Iterator[Frozen]:
    """The remaining parameters without a removable position, one axis each."""
    named = {member.entity for group in groups for member in group.members} | {entry.entity for entry in axes}
    for name in record.tensors:
        if name in record.parameters and name not in named:
            yield _kept_parameter(equations, record, name)


def _kept_parameter(equations: Equations, record: Trace, name: str) -> Frozen:
    dims, shape = record.axes.get(name, ()), record.tensors[name].shape
    operation, where = record.reader(name)
    labeled = [k for k, dim in enumerate(dims) if dim]
    axis = next((k for k in labeled if equations.stays(dims[k][0]).all()), labeled[0] if labeled else 0)
    reason = Reason(f"{operation} reads it in a form that is not that of a layer", where)
    if name in record.shared and not dims:
        reason = Reason(sharing(record, name))
    elif not operation:
        reason = Reason("no operation of this run reads it")
    elif not labeled:
        reason = Reason(f"{operation} reads it, and no axis of it has several positions", where)
    elif equations.stays(dims[axis][0]).all():
        reason = equations.reason(dims[axis][0])
    count = int(shape[axis]) if len(shape) else 1
    return Frozen(name, axis, count, reason.text, reason.where or where, reason.kind)


def _positions(equations: Equations, record: Trace) -> Iterator[tuple[str, int, Ints, Ints]]:
    """For each axis of each used entity: positions that are not frozen, and their components."""
    for name, dims in record.axes.items():
        for axis, dim in enumerate(dims):
            if dim:
                part = equations.part[dim[0]]
                free = np.flatnonzero(~equations.fixed[part])
                if len(free):
                    yield name, axis, free, part[free]


def _groups(equations: Equations, record: Trace) -> tuple[Group, ...]:
    """Groups of units that cut the same numbers of positions on the same axes."""
    where = {(name, axis): (index, part) for name, axis, index, part in _positions(equations, record)}
    keys = list(where)
    if not keys:
        return ()
    counted = [np.unique(part, return_counts=True) for _, part in where.values()]
    unit = np.concatenate([u for u, _ in counted])
    rows = np.concatenate([np.stack([np.full(len(n), k), n]) for k, (_, n) in enumerate(counted)], axis=1).T
    order = np.argsort(unit, kind="stable")
    unit, rows = unit[order], np.ascontiguousarray(rows[order])
    kinds = equations.kinds()
    by_pattern: dict[tuple[bytes, Kind], tuple[Ints, list[int]]] = {}
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(unit)], strict=True):
        key = rows[start:stop].tobytes(), kinds.get(int(unit[start]), "channel")
        by_pattern.setdefault(key, (rows[start:stop], []))[1].append(int(unit[start]))
    groups = []
    for (_, kind), (pattern, units) in by_pattern.items():
        axes = [keys[k] for k in pattern[:, 0]]
        if any(record.roles.get(axis) in {"out", "in"} for axis in axes):
            groups.append(_group(equations, record, axes, units, where, kind))
    return tuple(_unique_names(groups))


def _group(
    equations: Equations,
    record: Trace,
    axes: list[Axis],
    units: list[int],
    where: Mapping[Axis, tuple[Ints, Ints]],
    kind: Kind,
) -> Group:
    number = np.full(len(equations.fixed), -1, dtype=np.int64)
    order = _order(record, axes, units, where)
    number[order] = np.arange(len(order))
    members = []
    for name, axis in axes:
        index, part = where[name, axis]
        inside = number[part] >= 0
        role = record.roles.get((name, axis), "other")
        members.append(Member(name, axis, index[inside], number[part[inside]], role))
    first = next((m for m in members if m.role == "out"), members[0])
    name = first.entity.removesuffix(".weight")
    why = _why(equations, record, members[0]) if kind in {"width", "expert", "vocabulary"} else Reason("")
    multiple, min_units = _multiple(equations, number), _min_units(equations, number)
    return Group(name, len(units), kind, tuple(members), multiple, min_units, why.text, why.where)


def _why(equations: Equations, record: Trace, member: Member) -> Reason:
    """The call along the units, or the lookup of the units."""
    return equations.reason(record.axes[member.entity][member.axis][0][member.index])


def _min_units(equations: Equations, number: Ints) -> int:
    """The number of units that an operation chooses, at least 1."""
    counts = [count for layer, count in equations.ledger.min_units if (number[equations.part[layer]] >= 0).any()]
    return max(counts, default=1)


def _multiple(equations: Equations, number: Ints) -> int:
    """The least common multiple of the multiples that operations require of the number of units."""
    multiple = 1
    for layer, count in equations.ledger.multiples:
        units = number[equations.part[layer]]
        if (units >= 0).any():
            per_unit = int(np.bincount(units[units >= 0]).max())
            multiple = math.lcm(multiple, count // math.gcd(count, per_unit))
    return multiple


def _order(record: Trace, axes: list[Axis], units: list[int], where: Mapping[Axis, tuple[Ints, Ints]]) -> Ints:
    """Units by their first position on the axis that produces them."""
    best = next((a for a in axes if record.roles.get(a) == "out"), axes[0])
    components, first = np.unique(where[best][1], return_index=True)
    inside = np.isin(components, units)
    return np.asarray(components[inside][np.argsort(first[inside])], dtype=np.int64)


def _unique_names(groups: list[Group]) -> Iterator[Group]:
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if count == 1 else f"{group.name}#{count}"
        yield replace(group, name=name)


def _entity(record: Trace, name: str) -> Entity:
    tensor = record.tensors[name]
    used = name in record.axes
    shape = tuple(int(n) for n in tensor.shape)
    parameter = name in record.parameters
    trained = tensor.requires_grad or not _plain(tensor)  # whether quantized weights train is unknown
    itemsize = 0 if name in record.constants else tensor.element_size()
    return Entity(name, record.names[name], shape, itemsize, parameter, used, trained)


def _plain(tensor: Tensor) -> bool:
    """Whether torch itself can read the tensor; some subclasses need their own library."""
    return type(tensor.data) is Tensor


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
