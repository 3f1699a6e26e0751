"""Plans from exact zeros: the last step after penalties, gates and proximal methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import Channel, Element, Head
from prunella.graph.cut.changes import changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Frozen, Graph, Group, Member, ReasonKind
from prunella.graph.double import as_double
from prunella.graph.match import check_patterns, chosen, names_of_layer, spared
from prunella.graph.solve.groups import couple
from prunella.graph.verify import SINGLE, TOLERANCE, relative_error, unproven
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.checks import foreign_weights
from prunella.planning.diagnostics import obstacles
from prunella.planning.plan import Plan
from prunella.stats import Source, Subject, collect
from prunella.stats.subject import first_seen
from prunella.types import Inputs, Keep

Where = Channel | Head | Element | tuple[Channel | Head, ...]


def plan_zeros(
    model: nn.Module,
    inputs: Inputs,
    *,
    granularity: Where = (Channel(), Head()),  # noqa: B008
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Plan:
    """A plan that removes exactly the units that are zero, so that the smaller model has the same outputs.

    A unit is zero if every weight that reads it is zero, or if it is a constant that is read as zero: its own weights
    are zero, or the scale of the norm behind them, and on `inputs` all that reads it reads 0. If no weight reads it,
    all its own weights have to be zero. Each group is tried: if its removal changes the output in float64 on `inputs`,
    the group is kept, and the plan gives the reason. The minimum of units is always kept. A constant that is read as
    another number than 0 is kept; `fold_means` folds it. With `Element()` the masks are the zeros of every layer.

    inputs, skip, only: as for `prunella.plan`. Errors: NotSupported if nothing is zero.
    granularity: `Channel()`, `Head()`, both, or `Element()`.
    """
    model = with_plain_weights(model)
    with untouched(model, 0):
        graph = couple(model, inputs)
        check_patterns(graph, skip, only)
        if isinstance(granularity, Element):
            return _masks(model, graph, inputs, skip, only)
        granularities = granularity if isinstance(granularity, tuple) else (granularity,)
        if not granularities or not all(isinstance(unit, Channel | Head) for unit in granularities):
            raise RequestError("plan_zeros takes Channel(), Head(), both or Element()", f"found {granularity!r}")
        kinds = {unit.kind for unit in granularities}
        groups = [g for g in graph.groups if g.kind in kinds and not spared(graph, g, skip, only)]
        return _structure(model, graph, inputs, groups)


def _structure(model: nn.Module, graph: Graph, inputs: Inputs, groups: list[Group]) -> Plan:
    silent = _read_as_zero(model, graph, groups, inputs)
    dead = {group.name: _kept(model, graph, group, silent.get(group.name)) for group in groups}
    wanted = {name: keep for name, keep in dead.items() if not bool(keep.all())}
    faults = _faults(model, graph, wanted, inputs)
    frozen = [*graph.frozen, *(_stays(g, faults[g.name]) for g in groups if g.name in faults)]
    keep = {g.name: dead[g.name] for g in groups if g.name not in faults}
    if all(bool(mask.all()) for mask in keep.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in faults.items())
        if not groups:
            foreign = foreign_weights(model)
            why = "\n".join([*obstacles(graph, graph.frozen), *foreign]) or "the model has no parameters"
            raise NotSupported(
                "no unit is exactly zero: none could be removed",
                why,
                "`prunella inspect` shows the groups",
            )
        looked_at = f"{sum(g.size for g in groups)} units in {len(groups)} groups were looked at"
        why = why or f"{looked_at}{_constants(model, groups)}"
        what = f"no unit {'that is exactly zero can go' if faults else 'is exactly zero in every weight that reads it'}"
        raise NotSupported(what, why, "train longer or with more strength; small is not zero")
    made = Plan.of_structure(graph, keep, inputs=inputs, frozen=frozen)
    return replace(made, remarks=(*made.remarks, *_constants_kept(model, groups, keep)))


def _constants_kept(model: nn.Module, groups: Sequence[Group], keep: Keep) -> Iterator[str]:
    """The kept units with constant outputs, and why they are kept."""
    for group in groups:
        count = int((_constant(model, group) & keep[group.name]).sum()) if group.name in keep else 0
        if count and int(keep[group.name].sum()) > group.min_units:
            yield (
                f"{count} units of {group.name} have zero weights and are kept: their bias or the shift of their norm "
                "makes them a constant that is read as another number than 0; prune them with pr.plan, then "
                "fold_means adds the constant to the biases that read it"
            )


def _masks(model: nn.Module, graph: Graph, inputs: Inputs, skip: Sequence[str], only: Sequence[str]) -> Plan:
    named = dict(model.named_parameters(remove_duplicate=False))
    layers = [x for x in first_seen(graph.layers) if not chosen(names_of_layer(graph, x), skip, only)]
    masks = {layer.entity: (named[layer.entity].detach() != 0).cpu() for layer in layers}
    if all(bool(mask.all()) for mask in masks.values()):
        raise NotSupported("no weight is exactly zero", f"{len(layers)} layers were looked at", "small is not zero")
    return Plan.of_masks(graph, masks, inputs=inputs)


def _kept(model: nn.Module, graph: Graph, group: Group, silent: Tensor | None = None) -> Tensor:
    """Units that are not zero, and zero units by rising index up to the minimum of the group.

    silent: units that are constant and read as zero.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    members = [m for m in group.members if m.entity in named and m.role != "stat"]
    members = [m for m in members if m.role == "in"] or members
    alive = _alive(named, members, group.size)
    if silent is not None:
        alive &= ~silent
    count = max(int(alive.sum()), group.min_units)
    count = min(-(-count // group.multiple) * group.multiple, group.size)
    alive[(~alive).nonzero().flatten()[: count - int(alive.sum())]] = True
    return alive


def _alive(named: Mapping[str, Tensor], members: Sequence[Member], size: int) -> Tensor:
    """Units with a non-zero weight in some member."""
    alive = torch.zeros(size, dtype=torch.bool)
    for member in members:
        alive[_units_alive(named[member.entity].detach(), member)] = True
    return alive


def _constant(model: nn.Module, group: Group) -> Tensor:
    """Units with the same value for every input, in evaluation mode.

    All weights that produce the unit are zero; or every scale of a norm on it is zero, and each non-zero weight that
    produces it has a norm of its own.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    producers = [m for m in group.members if m.role == "out" and m.entity in named]
    scales = [m for m in group.members if m.role == "scale" and m.entity in named]
    if not producers or any(m.role == "other" for m in group.members):
        return torch.zeros(group.size, dtype=torch.bool)
    sources = torch.stack([_alive(named, [member], group.size) for member in producers])
    unscaled = ~_alive(named, scales, group.size) & (sources.sum(0) <= len(scales))
    return ~sources.any(0) | (unscaled if scales else torch.zeros_like(unscaled))


def _read_as_zero(model: nn.Module, graph: Graph, groups: Sequence[Group], inputs: Inputs) -> dict[str, Tensor]:
    """Group -> constant units that all reading weights read as exactly zero."""
    constant = {group.name: _constant(model, group) for group in groups}
    some = tuple(group for group in groups if bool(constant[group.name].any()))
    if not some:
        return {}
    statistics = collect(Subject(model, graph, some, inputs=inputs), ["unit_zeros"], Source([inputs]), "plan_zeros")
    silent = {}
    for group in some:
        zeros = statistics.get("unit_zeros", group.name)
        seen = not any(m.entity in statistics.unread for m in group.members if m.role == "in")
        if zeros is not None and seen:
            silent[group.name] = constant[group.name] & (zeros == 1)
    return silent


def _constants(model: nn.Module, groups: Sequence[Group]) -> str:
    """The number of units that are constant, and read as another number than zero."""
    count = sum(int(_constant(model, group).sum()) for group in groups)
    return f"; {count} are constant but are not read as zero, and fold_means may fold them" if count else ""


def _units_alive(weight: Tensor, member: Member) -> Tensor:
    lines = (weight != 0).movedim(member.axis, 0).flatten(1).any(1) if weight.dim() > 1 else weight != 0
    return torch.from_numpy(member.unit)[lines.cpu()[torch.from_numpy(member.index)]]


def _stays(group: Group, reason: str) -> Frozen:
    maker = next((m for m in group.members if m.role == "out"), group.members[0])
    return Frozen(maker.entity, maker.axis, len(maker.index), reason, group.where, ReasonKind.UNPROVEN)


def _faults(model: nn.Module, graph: Graph, keep: Keep, inputs: Any) -> dict[str, str]:
    """Group -> why it cannot be removed."""
    faults = unproven(model, graph, keep, inputs)
    left = {name: mask for name, mask in keep.items() if name not in faults}
    if not left or _unchanged(model, graph, left, inputs):
        return faults
    worse = [name for name, mask in left.items() if not _unchanged(model, graph, {name: mask}, inputs)]
    return faults | dict.fromkeys(worse or left, "its units are zero, yet the output changes without them")


def _unchanged(model: nn.Module, graph: Graph, keep: Keep, inputs: Any) -> bool:
    """Whether the model without these units has the same output, in float64 where the model runs in it."""
    small = copied(model)
    change_(small, changes(graph, keep))
    for double, tolerance in ((True, TOLERANCE), (False, SINGLE)):
        batch = as_double(inputs) if double else inputs
        try:
            with torch.no_grad():
                outputs = [outputs_of(_cast(variant, double), batch) for variant in (model, small)]
        except (RuntimeError, ValueError, TypeError):
            continue
        return relative_error(*outputs) <= tolerance
    return False


def _cast(model: nn.Module, double: bool) -> nn.Module:
    replica = copied(model).eval()
    return replica.double() if double else replica
