"""Units and weights chosen by hand: positions, masks, ratios and counts, by the name of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.graph.data import Frozen, Graph, Group, Layer, Member
from prunella.graph.match import check_known, matches, names_of_group, names_of_layer, parts
from prunella.planning.budget import Ladder
from prunella.targets import Sparsity, Target, Threshold
from prunella.types import Mask

Positions = Sequence[int] | Tensor
"""Whole numbers from 0, or a bool mask over all positions."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ByHand:
    """Units and weights pruned regardless of scores and budget. Keys are names of layers, or patterns (`fnmatch`).

    remove, keep: positions to remove, or the only positions to keep. They are output channels of a layer, or units of
        the named group (heads, experts, blocks). For masks: a bool tensor of the weight's shape.
    ratios: fraction in [0, 1) of the units (weights) of every group (layer) to remove, lowest scores first.
    counts: number of units (weights) to remove, lowest scores first.

    Positions take precedence over ratios and counts. Among ratios and counts an exact name takes precedence over a
    pattern, and the later of two patterns applies.
    """

    remove: Mapping[str, Positions] = field(default_factory=dict)
    keep: Mapping[str, Positions] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("remove", "keep", "ratios", "counts"):
            by_layer = getattr(self, option)
            if not isinstance(by_layer, Mapping):
                why = f"it is a {type(by_layer).__name__}; a mapping from the name of a layer is needed"
                raise RequestError(f"{option}= is not read", why, f"for example {option}={_EXAMPLES[option]}")
        named_twice = [name for name in self.remove if name in self.keep] + [n for n in self.ratios if n in self.counts]
        if named_twice:
            raise RequestError(
                f"{named_twice[0]} is named twice", "two options determine what is pruned of it", "give one of the two"
            )
        for name, ratio in self.ratios.items():
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                todo = f"for example ratios={_EXAMPLES['ratios']}"
                raise RequestError(
                    f"ratios= for {name} is {ratio!r}", "a ratio is the fraction to remove, in [0, 1)", todo
                )
        for name, count in self.counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                todo = f"for example counts={_EXAMPLES['counts']}"
                raise RequestError(
                    f"counts= for {name} is {count!r}", "a count is the number of units to remove, a whole number", todo
                )

    def __bool__(self) -> bool:
        return bool(self.remove or self.keep or self.ratios or self.counts)

    def describe(self) -> dict[str, Any]:
        """As plain data, for the recipe of a plan; masks as positions."""
        entries = {
            "remove": {name: _as_data(given) for name, given in self.remove.items()},
            "keep": {name: _as_data(given) for name, given in self.keep.items()},
            "ratios": dict(self.ratios),
            "counts": dict(self.counts),
        }
        return {option: values for option, values in entries.items() if values}


_EXAMPLES = {
    "remove": '{"layer1.0.conv1": [2, 5, 7]}',
    "keep": '{"layer1.0.conv1": [0, 1, 3]}',
    "ratios": '{"layer2.*": 0.3}',
    "counts": '{"fc1": 12}',
}


def positions_of(given: Positions) -> list[int]:
    """Positions as whole numbers; of a mask those that are True, in the order of its flattened weight."""
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return [int(x) for x in given.detach().cpu().flatten().nonzero().flatten()]
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    return [k for k, chosen in enumerate(values) if chosen] if _is_mask(values) else [_whole(x) for x in values]


def _is_mask(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(x, bool) for x in values)


def _whole(value: Any) -> Any:
    """An integer of any library as a Python integer; other values are returned unchanged, to be refused."""
    try:
        return value if isinstance(value, bool) else index(value)
    except TypeError:
        return value


def _as_data(given: Positions) -> list[int] | str:
    if isinstance(given, Tensor) and given.dim() > 1:
        return f"a mask, {int(given.sum())} of {given.numel()}"
    return positions_of(given)


def check_beside(by_hand: ByHand, target: Target | None, *, masks: bool) -> None:
    """Errors: RequestError for a target that counts only competing units, if units are also chosen by hand."""
    prunable = isinstance(target, Sparsity) and target.of == "prunable"
    if not by_hand or target is None or isinstance(target, Threshold) or not (masks or prunable):
        return
    what = "masks chosen by hand" if masks else "units chosen by hand"
    todo = "choose the rest by ratios= too" + ("" if masks else ", or ask for MACs, Params or Bytes")
    raise RequestError(f"{target} does not go with {what}", "it counts only the units that compete for it", todo)


# -- units of structure ------------------------------------------------------------------------------------------


def kept_by_position(
    by_hand: ByHand,
    graph: Graph,
    groups: Sequence[Group],
    frozen: Sequence[Frozen],
    hidden: Mapping[str, int] = NOTHING,
) -> dict[str, Mask]:
    """Group -> the units kept by `remove` and `keep`; units are removed with all slices coupled to them.

    hidden: recurrent layer -> its hidden size; its weights have several rows for each of these units.
    Errors: RequestError for an unknown name or position, or too few units; NotSupported for units that are frozen.
    """
    masks: dict[str, Mask] = {}
    sizes = {group.name: group.size for group in groups}
    for option, named in (("keep", by_hand.keep), ("remove", by_hand.remove)):
        for name, positions in named.items():
            for axis in _axes_named(graph, groups, frozen, name):
                if matches(name, [axis.name]) and axis.name in hidden:
                    axis = replace(axis, size=hidden[axis.name])
                units = axis.units(positions, frozen)
                for group_name in {group for group, _ in axis.owner.values()}:
                    mask = masks.setdefault(group_name, torch.ones(sizes[group_name], dtype=torch.bool, device="cpu"))
                    chosen = [unit for group, unit in units if group == group_name]
                    if option == "keep":
                        mask &= torch.zeros_like(mask).index_fill(
                            0, torch.tensor(chosen, dtype=torch.long, device="cpu"), True
                        )
                    else:
                        mask[chosen] = False
    named_groups = {group.name: group for group in groups if group.name in masks}
    for group_name, mask in masks.items():
        _check_width(named_groups[group_name], int(mask.sum()))
    return masks


@dataclass(frozen=True)
class _Axis:
    """Positions that can be named: channels of a layer, or units of a group. owner: position -> group and unit."""

    name: str
    entity: str
    size: int
    owner: Mapping[int, tuple[str, int]]

    def units(self, positions: Positions, frozen: Sequence[Frozen]) -> list[tuple[str, int]]:
        """Group and unit of each position. Errors: RequestError, NotSupported."""
        entries_given: object = positions
        if isinstance(entries_given, str | bytes | Mapping) or not (
            isinstance(entries_given, Iterable) or hasattr(entries_given, "tolist")
        ):
            why = f"{entries_given!r} is given; whole numbers or a bool mask are needed"
            raise RequestError(
                f"the positions of {self.name} cannot be read", why, f"for example {_EXAMPLES['remove']}"
            )
        entries = positions.tolist() if hasattr(positions, "tolist") else list(positions)
        if _is_mask(entries) and len(entries) != self.size:
            why = f"the mask has {len(entries)} entries, {self.name} has {self.size}"
            raise RequestError(f"the mask of {self.name} does not fit", why, "give one entry for each")
        numbers = positions_of(positions)
        wrong = [x for x in numbers if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < self.size]
        if wrong:
            why = f"positions are 0 to {self.size - 1}"
            raise RequestError(f"{self.name} has no position {wrong[0]!r}", why, "positions count from 0")
        stuck = [x for x in numbers if x not in self.owner]
        if stuck:
            reason = next((entry.reason for entry in frozen if entry.entity == self.entity), "no group has it")
            raise NotSupported(
                f"position {stuck[0]} of {self.name} cannot be removed", reason, "`prunella inspect` shows why"
            )
        return [self.owner[x] for x in numbers]


def _axes_named(graph: Graph, groups: Sequence[Group], frozen: Sequence[Frozen], name: str) -> list[_Axis]:
    """The axes for a name or a pattern: those of layers of that name, otherwise the groups inside a module."""
    layers = _axes_of_layers(graph, groups, name)
    if layers:
        return layers
    inside = [group for group in groups if matches(name, names_of_group(graph, group))]
    if not inside:
        raise _unknown(graph, groups, frozen, name)
    if len(inside) > 1 and not _is_pattern(name):
        what = ", ".join(group.name for group in inside[:4])
        raise RequestError(f"{name} holds {len(inside)} groups", f"they are {what}", "name one layer")
    return [
        _Axis(group.name, group.name, group.size, {unit: (group.name, unit) for unit in range(group.size)})
        for group in inside
    ]


def _axes_of_layers(graph: Graph, groups: Sequence[Group], name: str) -> list[_Axis]:
    owners: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    for group in groups:
        if group.kind not in ("channel", "width"):
            continue
        for member in _makers(graph, group, name):
            pairs = zip(member.index.tolist(), member.unit.tolist(), strict=True)
            owner = owners.setdefault((member.entity, member.axis), {})
            owner |= {index: (group.name, unit) for index, unit in pairs}
    return [
        _Axis(_module(entity), entity, graph.entities[entity].shape[axis], owner)
        for (entity, axis), owner in owners.items()
    ]


def _makers(graph: Graph, group: Group, name: str) -> list[Member]:
    """The members of this name that produce the units of a group: weights, otherwise scales of a norm."""
    for role in ("out", "scale"):
        members = [m for m in group.members if m.role == role and matches(name, _names(graph, m.entity))]
        if members:
            return members
    return []


def _names(graph: Graph, entity: str) -> set[str]:
    names = set(graph.entities[entity].names) | {entity}
    return names | {_module(name) for name in names}


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _check_width(group: Group, kept: int) -> None:
    if kept < group.min_units:
        why = f"{kept} of {group.size} units are left, and {group.min_units} are needed"
        raise RequestError(f"too much of {group.name} is removed", why, "keep more of them")
    if kept % group.multiple and kept != group.size:
        why = f"{kept} units are left, and an operation needs a multiple of {group.multiple}"
        raise RequestError(f"{group.name} cannot have this width", why, "remove more or fewer")


# -- numbers of units or weights ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quota:
    """The amount to remove: a ratio in [0, 1), or a count of units (weights)."""

    ratio: float | None = None
    count: int | None = None

    def of(self, size: int) -> int:
        """The number of units to remove out of `size`."""
        return round(size * self.ratio) if self.ratio is not None else int(self.count or 0)


def quotas_of_groups(
    by_hand: ByHand, graph: Graph, groups: Sequence[Group], frozen: Sequence[Frozen]
) -> dict[str, Quota]:
    """Group -> its quota by `ratios` and `counts`. Errors: as `kept_by_position`."""
    return _quotas(by_hand, graph, groups, frozen, {group.name: names_of_group(graph, group) for group in groups})


def quotas_of_layers(
    by_hand: ByHand, graph: Graph, layers: Sequence[Layer], frozen: Sequence[Frozen]
) -> dict[str, Quota]:
    """Entity of a layer -> the quota of its weights by `ratios` and `counts`. Errors: as `kept_by_position`."""
    return _quotas(by_hand, graph, layers, frozen, {layer.entity: names_of_layer(graph, layer) for layer in layers})


def _quotas(
    by_hand: ByHand,
    graph: Graph,
    members: Sequence[Group] | Sequence[Layer],
    frozen: Sequence[Frozen],
    names: Mapping[str, set[str]],
) -> dict[str, Quota]:
    quota_of = {name: Quota(ratio=ratio) for name, ratio in by_hand.ratios.items()}
    quota_of |= {name: Quota(count=count) for name, count in by_hand.counts.items()}
    for pattern in quota_of:
        if not any(matches(pattern, names_of) for names_of in names.values()):
            raise _unknown(graph, members, frozen, pattern)
    quotas = {}
    for key, names_of in names.items():
        matching = [pattern for pattern in quota_of if matches(pattern, names_of)]
        exact = [pattern for pattern in matching if not _is_pattern(pattern)]
        if matching:
            # Of two exact names the longer one is nearer to the layer: `layer2.0` comes before `layer2`.
            quotas[key] = quota_of[max(exact, key=len) if exact else matching[-1]]
    return quotas


def steps_for(name: str, ladder: Ladder, quota: Quota, size: int) -> int:
    """Steps for a group's quota: to the nearest allowed width. Errors: RequestError for a count that is not allowed."""
    asked = quota.of(size)
    choices = [ladder.removed(step) for step in range(len(ladder.keys) + 1)]
    nearest = min(choices, key=lambda count: (abs(count - asked), count))
    if quota.count is not None and nearest != asked:
        why = f"it has {size} and may lose {', '.join(map(str, choices[:6]))}{', ...' if len(choices) > 6 else ''}"
        raise RequestError(f"{name} cannot lose {asked} units", why, "choose one of these")
    return nearest


# -- masks of weights --------------------------------------------------------------------------------------------


def masks_by_hand(by_hand: ByHand, graph: Graph, layers: Sequence[Layer], frozen: Sequence[Frozen]) -> dict[str, Mask]:
    """Entity -> its mask, by `remove` and `keep`. Errors: as `kept_by_position`."""
    masks: dict[str, Mask] = {}
    for option, named in (("keep", by_hand.keep), ("remove", by_hand.remove)):
        for name, given in named.items():
            matching = [x for x in layers if matches(name, {x.name, x.module, *_names(graph, x.entity)})]
            if not matching:
                raise _unknown(graph, layers, frozen, name)
            for layer in matching:
                mask = _weight_mask(layer, graph.entities[layer.entity].shape, given)
                kept = mask if option == "keep" else ~mask
                masks[layer.entity] = masks[layer.entity] & kept if layer.entity in masks else kept
    return masks


def _weight_mask(layer: Layer, shape: tuple[int, ...], given: Positions) -> Mask:
    if not isinstance(given, Tensor) or given.dtype != torch.bool or tuple(given.shape) != shape:
        described = (
            f"a {given.dtype} tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        )
        why = f"{described} is given; weights are named by a bool tensor of shape {shape}"
        raise RequestError(
            f"the mask of {layer.name} does not fit", why, "or prune units: Recipe(granularity=Channel())"
        )
    return given.detach().cpu().clone()


# -- names -------------------------------------------------------------------------------------------------------


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _unknown(
    graph: Graph, known_by_name: Sequence[Group] | Sequence[Layer], frozen: Sequence[Frozen], name: str
) -> RequestError | NotSupported:
    """The error of a name without prunable units: frozen, with the reason, or misspelled."""
    entry = next((x for x in frozen if matches(name, parts(x.entity))), None)
    if entry is not None:
        return NotSupported(f"{name} cannot be pruned", entry.reason, "`prunella inspect` shows what can be pruned")
    names = {part.name for part in known_by_name}
    names |= {around for entity in graph.entities for around in _names(graph, entity)}
    try:
        check_known(names, (), [name])
    except RequestError as error:
        return RequestError(f"there is no layer {name!r} to prune", error.why, error.todo)
    return NotSupported(
        f"{name} cannot be pruned", "it produces no units", "`prunella inspect` shows what can be pruned"
    )
