"""From a criterion to one score per unit or per weight, for criteria of any level.

The shape that a criterion returns is its level: `(out, in)` weights, `(out,)` output rows, `(units,)` units. A coarser
granularity reduces it, a finer one is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.granularity.structure import Reduce, reduce_to_units
from prunella.graph.data import Group, Layer, Member
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.registry.controlled import Controlled, name_of, plain_function
from prunella.registry.method import Scope, needs_of, scope_of
from prunella.stats.collect import Statistics
from prunella.stats.subject import Subject
from prunella.stats.table import STATISTICS, of_level
from prunella.types import Saliency, Scores

Criterion = Callable[..., Tensor]
_ROLES: dict[Scope, tuple[str, ...]] = {
    "producer": ("out",),
    "consumer": ("in",),
    "group": ("out", "in", "bias", "scale", "shift", "other"),
}


_SCORED: dict[Scope, str] = {
    "producer": "layers that produce a unit",
    "consumer": "layers that read a unit",
    "group": "all weights of a unit",
}
_VERBS = {
    "out": "produces the units",
    "in": "reads the units (a weight that is used in both ways counts as a reader)",
}


class Absent(Exception):
    """A statistic that a group or layer does not have; the group or layer is then kept, with this reason."""


@dataclass(frozen=True)
class Scorer:
    """A criterion with all statistics that it may need."""

    criterion: Criterion
    subject: Subject
    statistics: Statistics
    seed: int = 0

    @property
    def name(self) -> str:
        """The criterion's name, for messages."""
        return name_of(self.criterion)

    def weights(self, layer: Layer) -> Saliency:
        """A score for every weight of a layer, as the matrix `(out, in)`, on the CPU."""
        if isinstance(self.criterion, Controlled):
            scores = replace(self, criterion=self.criterion.of).weights(layer)
            return self.criterion.change(scores, self._generator(layer.name))
        needs = needs_of(self.criterion)
        lacking = next(iter(of_level(needs, "unit", "block")), None)
        if lacking:
            blocks = STATISTICS[lacking].level == "block"
            raise RequestError(
                f"{self.name} scores units, not single weights",
                f"`{lacking}` exists for each {'residual block' if blocks else 'channel or head'}",
                f"use granularity={'Depth()' if blocks else 'Channel() or Head()'}",
            )
        scores = self._on_matrix(layer.entity)
        shape = to_matrix(self.subject.parameters[layer.entity], layer).shape
        if scores.shape != shape:
            raise RequestError(
                f"{self.name} gives shape {tuple(scores.shape)} for the matrix {tuple(shape)} of {layer.name}",
                "a mask needs one score for each weight",
                "use granularity=Channel() or a criterion that scores weights",
            )
        single = torch.promote_types(scores.dtype, torch.float32)
        return self._finite(scores, layer.name).detach().to("cpu", single)

    def units(self, group: Group, reduce: Reduce) -> Scores:
        """A score for every unit of a group, `(units,)` in float64 on the CPU. Raises Absent."""
        if isinstance(self.criterion, Controlled):
            scores = replace(self, criterion=self.criterion.of).units(group, reduce)
            return self.criterion.change(scores, self._generator(group.name))
        needs = needs_of(self.criterion)
        lacking = sorted(of_level(needs, "unit"))
        if group.paths and lacking:
            raise Absent(
                f"{self.name} scores channels and heads by `{', '.join(lacking)}`, which a block does not have"
            )
        per_weight = sorted(of_level(needs, "weight"))
        per_unit = sorted(set(needs) - set(per_weight))
        if not per_weight:
            scores = self.criterion(*[self._of_unit(need, group) for need in needs])
        elif set(per_unit) - {"noise"}:
            raise RequestError(
                f"{self.name} asks for numbers per unit and per weight together",
                f"per unit are {', '.join(per_unit)}, per weight {', '.join(per_weight)}",
                "a criterion for channels asks for one kind only",
            )
        else:
            scores = reduce_to_units(self._parts(group), group.size, reduce)
        if scores.shape != (group.size,):
            raise RequestError(f"{self.name} gives shape {tuple(scores.shape)} for {group.size} units of {group.name}")
        return self._finite(scores, group.name).detach().double().cpu()

    def _finite(self, scores: Tensor, where: str) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            todo = "look at the calibration data and the loss, or run in float32"
            raise BadInput(f"{self.name} gives {bad} scores for {where} that are not finite", "", todo)
        return scores

    # -- units ---------------------------------------------------------------------------------------------------

    def _of_unit(self, need: str, group: Group) -> Tensor:
        if need == "noise":
            return self._noise(group.name, (group.size,))
        if need == "norm_scale":
            return self._norm_scale(group)
        if need == "unit_weight":
            return self._unit_weight(group)
        value = self.statistics.get(need, group.name)
        if value is None:
            raise self._absent(need)
        return value

    def _absent(self, need: str) -> Absent:
        return Absent(f"{self.name} needs `{need}`, {STATISTICS[need].absent}")

    def _norm_scale(self, group: Group) -> Scores:
        parts = [
            (_by_position(self._parameter(m).abs(), m.axis)[torch.from_numpy(m.index)], torch.from_numpy(m.unit))
            for m in group.members
            if m.role == "scale" and m.entity in self.subject.parameters
        ]
        if not parts:
            raise self._absent("norm_scale")
        return reduce_to_units(parts, group.size, Reduce.MEAN)

    def _unit_weight(self, group: Group) -> Tensor:
        """All weights of each unit in the criterion's scope, one row a unit."""
        blocks = []
        for member in self._members(group):
            index, unit = torch.from_numpy(member.index), torch.from_numpy(member.unit)
            counts = torch.bincount(unit, minlength=group.size)
            if bool((counts != counts[0]).any()):
                raise NotSupported(f"units of {group.name} have different numbers of weights in {member.entity}")
            values = _by_position(self._parameter(member), member.axis)
            blocks.append(values[index[unit.argsort(stable=True)]].reshape(group.size, -1).double())
        if not blocks:
            raise self._absent("unit_weight")
        return torch.cat(blocks, 1)

    # -- weights -------------------------------------------------------------------------------------------------

    def _parts(self, group: Group) -> list[tuple[Tensor, Tensor]]:
        """Saliencies at the positions of every member in scope, with the unit of each position."""
        parts, reason = [], self._out_of_scope(group)
        for member in self._members(group):
            try:
                values = self._along(member)
            except Absent as error:
                reason = str(error)
                continue
            if values is not None:
                parts.append((values.detach().cpu()[torch.from_numpy(member.index)], torch.from_numpy(member.unit)))
        if not parts:
            raise Absent(reason)
        return parts

    def _along(self, member: Member) -> Tensor | None:
        """Saliencies by position on the member's axis; None if they are per row and this axis is not the rows."""
        layer = self.subject.layer_of.get(member.entity)
        scores = self._on_matrix(member.entity)
        if scores.dim() == 1:
            return scores.unsqueeze(1) if member.axis == (layer.out_axis if layer else 0) else None
        weight = self.subject.parameters[member.entity]
        return _by_position(from_matrix(scores, weight, layer) if layer else scores.reshape(weight.shape), member.axis)

    def _on_matrix(self, entity: str) -> Tensor:
        """The criterion on one parameter seen as a matrix: `(out, in)` or `(out,)`."""
        scores = self.criterion(*[self._of_matrix(need, entity) for need in needs_of(self.criterion)])
        rows = self._matrix(entity, self.subject.parameters[entity]).shape[0]
        if scores.dim() not in (1, 2) or scores.shape[0] != rows:
            raise RequestError(
                f"{self.name} gives shape {tuple(scores.shape)} for {entity}", f"({rows}, in) or ({rows},) is needed"
            )
        return scores

    def _of_matrix(self, need: str, entity: str) -> Tensor:
        if need == "weight":
            return self._matrix(entity, self.subject.parameters[entity].detach())
        if need == "noise":
            weight = self.subject.parameters[entity]
            return self._noise(entity, tuple(self._matrix(entity, weight).shape)).to(weight.device)
        value = self.statistics.get(need, entity)
        if value is None:
            why = self.statistics.unread.get(entity, "it did not run on the data")
            raise Absent(f"{self.name} needs `{need}`, which {entity} does not have: {why}")
        layout = STATISTICS[need].layout
        if layout == "own":
            return value
        if layout == "stack":
            return torch.stack([self._matrix(entity, part) for part in value])
        matrix = self._matrix(entity, value)
        return matrix[0] if layout == "row" and bool((matrix == matrix[:1]).all()) else matrix

    def _matrix(self, entity: str, value: Tensor) -> Tensor:
        layer = self.subject.layer_of.get(entity)
        if layer is not None:
            return to_matrix(value, layer)
        return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)

    def _members(self, group: Group) -> list[Member]:
        roles = _ROLES["group" if group.paths else scope_of(plain_function(self.criterion))]
        return [m for m in group.members if m.role in roles and m.entity in self.subject.scored]

    def _out_of_scope(self, group: Group) -> str:
        """The weights that the criterion scores, and those that the units have instead."""
        scope = scope_of(plain_function(self.criterion))
        wanted, named = _SCORED[scope], self.subject.parameters
        imaginary = [m.entity for m in group.members if m.entity in named and named[m.entity].is_complex()]
        if imaginary:
            return f"{self.name} scores real weights, and {imaginary[0]} is complex: write the layer with real ones"
        weights = [m for m in group.members if m.role in ("out", "in")]
        instead = dict.fromkeys(f"{m.entity}, which {_VERBS[m.role]}" for m in weights if m.role in _VERBS)
        return f"{self.name} scores {wanted}, and here there is only {'; '.join(instead) or 'no layer with a weight'}"

    def _parameter(self, member: Member) -> Tensor:
        return self.subject.parameters[member.entity].detach().cpu()

    def _noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self._generator(name), dtype=torch.float64, device="cpu")

    def _generator(self, name: str) -> torch.Generator:
        # By name, so that leaving a group out does not change the numbers of the others. The generator takes 32 bits.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))


def _by_position(values: Tensor, axis: int) -> Tensor:
    """A parameter's values by position on one axis: `(positions, all others)`."""
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)
