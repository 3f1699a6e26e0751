"""Statistics of the activation of a unit, taken at the layers that read the unit.

The input of the layers that read a unit *is* its activation. It includes every nonlinearity, normalization or pooling
after the layer that produces the unit, as a module or as a function of any name. Behind an average pooling the
activation is the pooled one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from prunella.graph.data import Group, Member
from prunella.model.observed_reads import Unread, View
from prunella.model.product import Product
from prunella.stats.activation import ActivationWatch, lay_out, total
from prunella.stats.subject import Subject

Measure = Callable[[Product], Tensor | None]
"""Values in the shape of the input, to be summed over tokens; None if the measure does not apply to the product."""


class _Sums:
    """Totals of measures of the inputs of weights over all tokens, and the number of tokens, in float64."""

    def __init__(self, weights: dict[str, Tensor], measures: Sequence[Measure]) -> None:
        self.weights = weights
        self._measures = (_one, *measures)
        self._totals: list[dict[tuple[str, View], Tensor]] = [{} for _ in self._measures]
        self.unread: dict[str, Unread] = {}

    def watch(self) -> AbstractContextManager[object]:
        return ActivationWatch(self.weights, self._add, self.unread)

    def seen(self, name: str) -> bool:
        return any(key[0] == name for key in self._totals[0])

    def of(self, name: str) -> list[Tensor]:
        """Number of tokens and the total of each measure, in the shape of the weight."""
        return [lay_out(self.weights[name], name, totals) for totals in self._totals]

    def _add(self, name: str, view: View, read: Product) -> None:
        measured = [measure(read) for measure in self._measures]
        if any(values is None for values in measured):
            return
        for totals, values in zip(self._totals, measured, strict=True):
            assert values is not None
            sums = total(read, values, once=True)
            totals[name, view] = totals[name, view] + sums if (name, view) in totals else sums


Parts = Sequence[tuple[Tensor, list[Tensor]]]
"""For each reader of a group: the unit of every position, and the sums at the positions, tokens first."""


class PerUnit:
    """Values of each unit of each group, from the sums at its readers. `finish`: (units, parts) -> values."""

    def __init__(self, subject: Subject, measures: Sequence[Measure], finish: Callable[[int, Parts], Tensor]) -> None:
        self._groups, self._finish = subject.groups, finish
        names = {m.entity for group in subject.groups for m in _readers(group)}
        self._sums = _Sums({n: subject.parameters[n] for n in subject.scored if n in names}, measures)
        self.unread = self._sums.unread

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return self._sums.watch()

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By name of the group; a group without readers is absent."""
        by_group = {}
        for group in self._groups:
            parts = [(torch.from_numpy(m.unit), self._at(m)) for m in _readers(group) if self._sums.seen(m.entity)]
            if parts:
                by_group[group.name] = self._finish(group.size, parts)
        return by_group

    def _at(self, member: Member) -> list[Tensor]:
        """Sums at the member's positions."""
        index = torch.from_numpy(member.index)
        return [_along(values, member.axis)[index] for values in self._sums.of(member.entity)]


def unit_zeros(subject: Subject) -> PerUnit:
    """`unit_zeros`: fraction of the activations of each unit that are exactly 0."""
    return PerUnit(subject, [lambda read: (read.x.detach() == 0).double()], _mean)


def unit_rank(subject: Subject) -> PerUnit:
    """`unit_rank`: mean rank of the feature maps of each unit, over samples and over the convolutions that read it."""
    return PerUnit(subject, [_ranks], _mean)


def unit_norm(subject: Subject) -> PerUnit:
    """`unit_norm`: root of the mean square of the activation of each unit."""
    return PerUnit(subject, [_square], lambda units, parts: _mean(units, parts).sqrt())


def unit_var(subject: Subject) -> PerUnit:
    """`unit_var`: variance of the activation over samples (and pixels), the mean over the positions of a unit."""
    return PerUnit(subject, [_value, _square], _mean_variance)


class InputVar:
    """`input_var`: variance over all tokens of the input that each weight multiplies, by entity, in its shape.

    Convolutions: over all samples and pixels of a channel, without padding, equal at every position of the kernel.
    """

    def __init__(self, subject: Subject) -> None:
        names = [name for name in subject.scored if name in subject.layer_of]
        self._sums = _Sums({name: subject.parameters[name] for name in names}, [_value, _square])
        self.unread = self._sums.unread

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return self._sums.watch()

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By entity; the sums of one weight at a time are in its shape, in float64."""
        seen = filter(self._sums.seen, self._sums.weights)
        return {name: _variance(*self._sums.of(name)).to(torch.float32) for name in seen}


def _mean(units: int, parts: Parts) -> Tensor:
    """Mean of a single measure over all readers."""
    count = total = torch.zeros(units, dtype=torch.float64, device="cpu")
    for unit, (tokens, values) in parts:
        count, total = count.index_add(0, unit, tokens), total.index_add(0, unit, values)
    return total / count.clamp_min(1)


def _mean_variance(units: int, parts: Parts) -> Tensor:
    """Variance of each position, then the mean over the positions."""
    count = total = torch.zeros(units, dtype=torch.float64, device="cpu")
    for unit, sums in parts:
        total = total.index_add(0, unit, _variance(*sums))
        count = count.index_add(0, unit, torch.ones(len(unit), dtype=torch.float64, device="cpu"))
    return total / count.clamp_min(1)


def _variance(tokens: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    mean = total / tokens.clamp_min(1)
    return (squares / tokens.clamp_min(1) - mean.square()).clamp_min(0)


def _readers(group: Group) -> list[Member]:
    return [] if group.paths else [m for m in group.members if m.role == "in"]


def _along(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1).cpu()


def _one(read: Product) -> Tensor:
    return read.x.new_ones((), dtype=torch.float64).expand(read.x.shape)


def _value(read: Product) -> Tensor:
    return read.x.detach().double()


def _square(read: Product) -> Tensor:
    return read.x.detach().double().square()


def _ranks(read: Product) -> Tensor | None:
    """Rank of every map of `(samples, channels, height, width)` at each of its positions; None for other inputs."""
    if read.operand.dim() != 4 or read.x.dim() != 4:
        return None
    maps = read.x.detach().to(torch.promote_types(read.x.dtype, torch.float32))
    ranks: Tensor = torch.linalg.matrix_rank(maps)
    return ranks.double()[..., None, None].expand(read.x.shape)
