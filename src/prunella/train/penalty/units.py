"""The coupled units of a model, for training: the weights that are pruned together, by name, and sums over them.

`coupled_units` traces the model once; its result is plain data that fits every copy of the model. A weight is in one
unit of the group that its row produces, and in one unit of the group that its column reads. Both units count the
weight, and either one removes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.granularity import Channel, Head
from prunella.graph.data import Graph, Group, Layer, Member, Role
from prunella.graph.match import check_patterns, chosen, names_of_layer, spared
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.model.unwrap import unwrap
from prunella.model.weight_norm import scaled_by_norm
from prunella.stats.subject import first_seen
from prunella.types import Inputs

Named = Mapping[str, Tensor]
"""Parameters by name."""


@dataclass(frozen=True)
class Slice:
    """Position `index[i]` on `axis` (of length `length`) of the parameter `name` belongs to unit `unit[i]`."""

    name: str
    axis: int
    length: int
    index: Tensor
    unit: Tensor
    role: Role


@dataclass(frozen=True)
class Units:
    """`size` coupled units of one group. weights: `(size,)`, the number of weights of each unit over all slices."""

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
        """For each slice the broadcast factor of its parameter that multiplies unit `u` by `factor[u]`."""
        return [(part.name, broadcast(named[part.name], part, factor)) for part in self.slices]

    @torch.no_grad()
    def scale_(self, named: Named, factor: Tensor) -> None:
        """Multiply every weight of unit `u` by `factor[u]`, in place; a factor of 0 leaves exact zeros."""
        for name, line in self.factors(named, factor):
            named[name].mul_(line)

    def _dtype(self, named: Named) -> torch.dtype:
        return torch.promote_types(named[self.slices[0].name].dtype, torch.float32)


def broadcast(weight: Tensor, part: Slice, factor: Tensor) -> Tensor:
    """The `factor` of each unit along the slice's axis, broadcast to `weight`; 1 where a position is in no unit."""
    line = torch.ones(weight.shape[part.axis], dtype=factor.dtype, device=factor.device)
    line = line.index_put((part.index.to(factor.device),), factor[part.unit.to(factor.device)])
    return line.to(weight).reshape([-1 if axis == part.axis else 1 for axis in range(weight.dim())])


@dataclass(frozen=True)
class CoupledUnits:
    """The prunable units of a model, by name; `coupled_units` makes them.

    groups: coupled channels and heads.     layers: weights that multiply an activation, for methods on single weights.
    """

    groups: tuple[Units, ...]
    layers: tuple[Layer, ...]

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that the units name. RequestError if one is missing."""
        names = [part.name for group in self.groups for part in group.slices] + [layer.entity for layer in self.layers]
        named = parameters(model, dict.fromkeys(names))
        for part in (part for group in self.groups for part in group.slices):
            if named[part.name].shape[part.axis] != part.length:
                why = f"axis {part.axis} had {part.length} positions, now {named[part.name].shape[part.axis]}"
                raise RequestError(
                    f"{part.name} has another size", why, "call coupled_units(model, batch) for this model"
                )
        return named


def parameters(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """The parameters of these names. RequestError if the model lacks one."""
    known = dict(unwrap(model).named_parameters(remove_duplicate=False))
    missing = next((name for name in names if name not in known), None)
    if missing:
        raise RequestError(
            f"the model has no parameter {missing}",
            "it is another model, was shrunk, or carries a gate on this weight",
            "call coupled_units(model, batch) for this model; merge_gates_(model) removes gates",
        )
    return {name: known[name] for name in names}


def coupled_units(
    model: nn.Module,
    inputs: Inputs,
    *,
    granularity: Channel | Head | tuple[Channel | Head, ...] = (Channel(), Head()),  # noqa: B008
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> CoupledUnits:
    """The coupled units of `model` and its layers. The model does not change.

    inputs, skip, only: as for `prunella.plan`. granularity: channels, heads or both. Zero channels and heads can be
    removed exactly; a width under a norm cannot. Errors: RequestError, and NotSupported if nothing can be pruned.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> units = pr.train.coupled_units(model, x)
        >>> [(group.name, group.size) for group in units.groups]
        [('0', 8)]
    """
    model = with_plain_weights(model)
    granularities = granularity if isinstance(granularity, tuple) else (granularity,)
    wrong = [entry for entry in granularities if not isinstance(entry, Channel | Head)]
    if wrong or not granularities:
        why = f"found {wrong[0]!r}" if wrong else "found none"
        todo = "zeros in other units cannot be removed exactly"
        raise RequestError("coupled units are Channel() and Head()", why, todo)
    with untouched(model, 0):
        graph = couple(model, inputs)
    check_patterns(graph, skip, only)
    kinds = {entry.kind for entry in granularities}
    scaled = {(name, entry.axis) for name, entry in scaled_by_norm(model).items()}
    groups = tuple(units for g in graph.groups if g.kind in kinds if (units := _units(graph, g, skip, only, scaled)))
    layers = tuple(x for x in first_seen(graph.layers) if not chosen(names_of_layer(graph, x), skip, only))
    if not groups and not layers:
        why = "skip= and only= leave nothing, or no layer has a weight"
        raise NotSupported("there is nothing to prune in this model", why)
    return CoupledUnits(groups, layers)


def _units(
    graph: Graph, group: Group, skip: Sequence[str], only: Sequence[str], scaled: Collection[tuple[str, int]]
) -> Units | None:
    """scaled: axes of parameters on which torch's weight norm makes a unit zero by its scale alone."""
    members = [m for m in group.members if m.role != "stat" and graph.entities[m.entity].parameter]
    members = [m for m in members if (m.entity, m.axis) not in scaled]
    if spared(graph, group, skip, only) or not members:
        return None
    weights = torch.zeros(group.size, dtype=torch.long, device="cpu")
    for member in members:
        shape = graph.entities[member.entity].shape
        line = graph.numel(member.entity) // shape[member.axis]
        weights += line * torch.bincount(torch.from_numpy(member.unit), minlength=group.size)
    return Units(group.name, group.size, tuple(_slice(graph, m) for m in members), weights)


def _slice(graph: Graph, m: Member) -> Slice:
    length = graph.entities[m.entity].shape[m.axis]
    return Slice(m.entity, m.axis, length, torch.from_numpy(m.index), torch.from_numpy(m.unit), m.role)
