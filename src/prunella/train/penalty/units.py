"""The coupled units of a model, for training: which weights live and die together, by name, and sums over them.

`coupled` looks once; what it returns is plain data that fits every copy of the model. A weight lies in a unit of the
group that its row produces and in a unit of the group that its column reads: both count it, and either removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import Channel, Head
from prunella.graph.data import Graph, Group, Layer, Member, Role
from prunella.graph.match import check_patterns, chosen, names_of_layer, spared
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.stats.subject import first_seen
from prunella.types import Inputs

Named = Mapping[str, Tensor]
"""Parameters by name."""


@dataclass(frozen=True)
class Slice:
    """Position `index[i]` on `axis`, which has `length` of them, of the parameter `name` belongs to unit `unit[i]`."""

    name: str
    axis: int
    length: int
    index: Tensor
    unit: Tensor
    role: Role


@dataclass(frozen=True)
class Units:
    """`size` coupled units of one group. weights: `(size,)`, how many numbers each unit has in all slices."""

    name: str
    size: int
    slices: tuple[Slice, ...]
    weights: Tensor

    def squares(self, named: Named) -> Tensor:
        """Sum of the squares of each unit's weights, `(size,)`, differentiable."""
        return self.dots(named, named)

    def dots(self, first: Named, second: Named) -> Tensor:
        """Scalar product of each unit's weights in two sets of values, `(size,)`, differentiable."""
        total = torch.zeros(self.size, dtype=self._dtype(first), device=first[self.slices[0].name].device)
        for part in self.slices:
            product = first[part.name] * second[part.name]
            lines = product.movedim(part.axis, 0).flatten(1).sum(1) if product.dim() > 1 else product
            index, unit = part.index.to(lines.device), part.unit.to(total.device)
            total = total.index_add(0, unit, lines[index].to(total))
        return total

    def factors(self, named: Named, factor: Tensor) -> list[tuple[str, Tensor]]:
        """For each slice what multiplies its parameter when unit `u` is multiplied by `factor[u]`: it broadcasts."""
        return [(part.name, broadcast(named[part.name], part, factor)) for part in self.slices]

    @torch.no_grad()
    def scale_(self, named: Named, factor: Tensor) -> None:
        """Multiply every weight of unit `u` by `factor[u]`, in place; a factor of 0 leaves exact zeros."""
        for name, line in self.factors(named, factor):
            named[name].mul_(line)

    def _dtype(self, named: Named) -> torch.dtype:
        return torch.promote_types(named[self.slices[0].name].dtype, torch.float32)


def broadcast(weight: Tensor, part: Slice, factor: Tensor) -> Tensor:
    """`factor` of the units as a line along the slice's axis, 1 where a position belongs to no unit."""
    line = torch.ones(weight.shape[part.axis], dtype=factor.dtype, device=factor.device)
    line = line.index_put((part.index.to(factor.device),), factor[part.unit.to(factor.device)])
    return line.to(weight).reshape([-1 if axis == part.axis else 1 for axis in range(weight.dim())])


@dataclass(frozen=True)
class Coupled:
    """What may be pruned in a model, by name. Made by `coupled`.

    groups: coupled channels and heads.     layers: weights that multiply an activation, for methods on single weights.
    """

    groups: tuple[Units, ...]
    layers: tuple[Layer, ...]

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that the units speak of. RequestError if they are not there."""
        mine = [part.name for group in self.groups for part in group.slices] + [layer.entity for layer in self.layers]
        named = parameters(model, dict.fromkeys(mine))
        for part in (part for group in self.groups for part in group.slices):
            if named[part.name].shape[part.axis] != part.length:
                why = f"axis {part.axis} had {part.length} positions, now {named[part.name].shape[part.axis]}"
                raise RequestError(f"{part.name} has another size", why, "call coupled(model, batch) for this model")
        return named


def parameters(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """Parameters by these names. RequestError for one that the model does not have."""
    known = dict(unwrap(model).named_parameters(remove_duplicate=False))
    missing = next((name for name in names if name not in known), None)
    if missing:
        raise RequestError(
            f"the model has no parameter {missing}",
            "it is another model, was shrunk, or carries gates on this weight",
            "call coupled(model, batch) for this model; bake_(model) removes gates",
        )
    return {name: known[name] for name in names}


def coupled(
    model: nn.Module,
    inputs: Inputs,
    *,
    granularity: Channel | Head | tuple[Channel | Head, ...] = (Channel(), Head()),  # noqa: B008
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Coupled:
    """The coupled units of `model` and its layers. Reads the model and changes nothing.

    inputs, skip, only: as for `prunella.plan`. granularity: channels, heads or both; they are exact under zeros, which
    a width that a norm runs along is not. Errors: RequestError, and NotSupported where there is nothing to prune.
    """
    model = unwrap(model)
    grains = granularity if isinstance(granularity, tuple) else (granularity,)
    wrong = [grain for grain in grains if not isinstance(grain, Channel | Head)]
    if wrong or not grains:
        found = f"found {wrong[0]!r}" if wrong else "found none"
        raise RequestError(
            "training toward zeros is for Channel() and Head()", found, "other units are not exact zeros"
        )
    with untouched(model, 0):
        graph = couple(model, inputs)
    check_patterns(graph, skip, only)
    kinds = {grain.kind for grain in grains}
    groups = tuple(made for g in graph.groups if g.kind in kinds if (made := _units(graph, g, skip, only)))
    layers = tuple(x for x in first_seen(graph.layers) if not chosen(names_of_layer(graph, x), skip, only))
    if not groups and not layers:
        raise NotSupported("there is nothing to prune in this model", "all is left out, or multiplies by no weight")
    return Coupled(groups, layers)


def _units(graph: Graph, group: Group, skip: Sequence[str], only: Sequence[str]) -> Units | None:
    members = [m for m in group.members if m.role != "stat" and graph.entities[m.entity].parameter]
    if spared(graph, group, skip, only) or not members:
        return None
    weights = torch.zeros(group.size, dtype=torch.long)
    for member in members:
        shape = graph.entities[member.entity].shape
        line = graph.numel(member.entity) // shape[member.axis]
        weights += line * torch.bincount(torch.from_numpy(member.unit), minlength=group.size)
    return Units(group.name, group.size, tuple(_slice(graph, m) for m in members), weights)


def _slice(graph: Graph, m: Member) -> Slice:
    length = graph.entities[m.entity].shape[m.axis]
    return Slice(m.entity, m.axis, length, torch.from_numpy(m.index), torch.from_numpy(m.unit), m.role)
