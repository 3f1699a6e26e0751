"""Plans from exact zeros: the last step after penalties, gates and proximal methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from prunella.graph.other_sizes import other_sizes
from prunella.graph.solve.groups import couple
from prunella.graph.verify import SINGLE, TOLERANCE, relative_error, unproven
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.masks import reapply_
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.checks import foreign_weights
from prunella.planning.constants import constants_read
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
    another number than 0 goes where the layers that read it can make up for it exactly: by their bias, or by the mean
    of the batch normalization behind them (`Plan.weights`). Where they cannot, as at the border of a padded
    convolution, it is kept, and a remark says why. With `Element()` the masks are the zeros of every layer.

    inputs, skip, only: as for `prunella.plan`. Errors: NotSupported if nothing is zero.
    granularity: `Channel()`, `Head()`, both, or `Element()`.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> model[2].weight.data[:, :3] = 0
        >>> pr.shrink(model, pr.planning.plan_zeros(model, x))[0].out_features
        5
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
    folded = _folded(model, graph, [group for group in groups if group.name in keep], keep, inputs)
    keep |= folded.keep
    if all(bool(mask.all()) for mask in keep.values()):
        raise _nothing(model, graph, groups, faults, folded.faults)
    made = Plan.of_structure(graph, keep, inputs=inputs, frozen=frozen)
    remarks = (*made.remarks, *_constants_kept(model, groups, keep, folded.faults))
    return replace(made, weights=folded.weights, remarks=remarks)


def _nothing(
    model: nn.Module, graph: Graph, groups: list[Group], faults: Mapping[str, str], unfolded: Mapping[str, str]
) -> NotSupported:
    if not groups:
        foreign = foreign_weights(model)
        why = "\n".join([*obstacles(graph, graph.frozen), *foreign]) or "the model has no parameters"
        todo = "`prunella inspect` shows the groups"
        return NotSupported("no unit is exactly zero: none could be removed", why, todo)
    looked_at = f"{sum(g.size for g in groups)} units in {len(groups)} groups were looked at"
    reasons = [f"{name}: {reason}" for name, reason in faults.items()]
    kept = "".join(f"; {name}: {reason}" for name, reason in unfolded.items())
    why = "; ".join(reasons) or f"{looked_at}{_constants(model, groups)}{kept}"
    zero = f"no unit {'that is exactly zero can go' if faults else 'is exactly zero in every weight that reads it'}"
    return NotSupported(zero, why, "train longer or with more strength; small is not zero")


@dataclass(frozen=True)
class _Folded:
    """Masks without the constant units that a bias makes up for, the new biases, and why other groups keep theirs."""

    keep: dict[str, Tensor]
    weights: dict[str, Tensor]
    faults: dict[str, str]


def _folded(model: nn.Module, graph: Graph, groups: Sequence[Group], keep: Keep, inputs: Inputs) -> _Folded:
    """Remove constant units group by group, as long as the output stays the same."""
    some = [group for group in groups if bool((_constant(model, group) & keep[group.name]).any())]
    read = constants_read(model, some, inputs) if some else None
    done = _Folded({}, {}, {})
    for group in some if read else ():
        units = _removable(group, keep[group.name], _constant(model, group))
        shifts = read.fold(group, units) if read and bool(units.any()) else {}
        if isinstance(shifts, str):
            done.faults[group.name] = shifts
        if not shifts or isinstance(shifts, str):
            continue
        new = {group.name: keep[group.name] & ~units}
        weights = {**done.weights, **_shifted(model, shifts, done.weights)}
        if _same(model, graph, {**keep, **done.keep, **new}, inputs, weights):
            done.keep.update(new)
            done.weights.update(weights)
        else:
            done.faults[group.name] = "no bias makes up for them exactly"
    return done


def _removable(group: Group, keep: Tensor, constant: Tensor) -> Tensor:
    """The constant units that may go, by rising index, so that as many are left as the group needs."""
    units = (keep & constant).nonzero().flatten()
    left = int(keep.sum()) - len(units)
    least = max(left, group.min_units)
    spare = min(-(-least // group.multiple) * group.multiple, group.size) - left
    removed = torch.zeros(group.size, dtype=torch.bool, device="cpu")
    removed[units[max(spare, 0) :]] = True
    return removed


def _shifted(model: nn.Module, shifts: Mapping[str, Tensor], done: Mapping[str, Tensor]) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    old = {name: done.get(name, held[name]).detach() for name in shifts}
    new = {name: old[name].double() + shift.to(old[name].device) for name, shift in shifts.items()}
    return {name: values.to(old[name].dtype) for name, values in new.items()}


def _same(model: nn.Module, graph: Graph, keep: Keep, inputs: Inputs, weights: Mapping[str, Tensor]) -> bool:
    """Whether the smaller model with these weights has the outputs of the model, on the example and on other sizes."""
    replaced = copied(model)
    replaced.load_state_dict({**replaced.state_dict(), **weights})
    reapply_(replaced)  # a masked bias makes up for nothing
    if unproven(replaced, graph, keep, inputs):
        return False
    return all(_unchanged(model, graph, keep, batch, replaced) for batch in (inputs, *other_sizes(model, inputs)))


def _constants_kept(model: nn.Module, groups: Sequence[Group], keep: Keep, faults: Mapping[str, str]) -> Iterator[str]:
    """The units that compute the same for every input and are kept, and why."""
    for group in groups:
        count = int((_constant(model, group) & keep[group.name]).sum()) if group.name in keep else 0
        if count and int(keep[group.name].sum()) > group.min_units:
            why = f" ({faults[group.name]})" if group.name in faults else ""
            yield (
                f"{count} units of {group.name} have zero weights and are kept: their bias or the shift of their norm "
                f"makes them a constant that is read as another number than 0{why}; prune them with pr.plan, then "
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
    alive = torch.zeros(size, dtype=torch.bool, device="cpu")
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
        return torch.zeros(group.size, dtype=torch.bool, device="cpu")
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


def _unchanged(model: nn.Module, graph: Graph, keep: Keep, inputs: Any, replaced: nn.Module | None = None) -> bool:
    """Whether the model without these units has the same output, in float64 where the model runs in it.

    replaced: the same model with other biases, of which the smaller one is cut. They are rounded to their type.
    """
    small = copied(replaced or model)
    change_(small, changes(graph, keep))
    for double, tolerance in ((True, TOLERANCE if replaced is None else _ROUNDED), (False, SINGLE)):
        batch = as_double(inputs) if double else inputs
        try:
            with torch.no_grad():
                outputs = [outputs_of(_cast(variant, double), batch) for variant in (model, small)]
        except (RuntimeError, ValueError, TypeError):
            continue
        return relative_error(*outputs) <= tolerance
    return False


_ROUNDED = 1e-5
"""Of biases that are rounded to float32, relative to the outputs."""


def _cast(model: nn.Module, double: bool) -> nn.Module:
    replica = copied(model).eval()
    return replica.double() if double else replica
