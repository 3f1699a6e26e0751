"""The candidates for a budget, units of structure or weights under a mask, and the amount that remains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from prunella.allocation.pool import Allocation, Pool
from prunella.errors import RequestError, TargetMissed
from prunella.granularity import Block, Competing, Element, Fixed
from prunella.granularity.regions import Labelled
from prunella.graph.cut.macs import macs_by_layer
from prunella.graph.data import Frozen, Graph, Group, Layer
from prunella.graph.matrix import kernel_shape
from prunella.measure.timing import Timing
from prunella.planning.accounting import model_weights
from prunella.planning.budget import Ladder, allocate, ladder, most, solve
from prunella.planning.diagnostics import nothing_removed, target_missed
from prunella.planning.latency import LatencyProbe, search_latency
from prunella.selection import Counts, removal_order
from prunella.targets import Bytes, Latency, MACs, Params, Sparsity, Target
from prunella.types import Mask, Scores


class Candidates(Protocol):
    """Pools that shrink, and the remaining amount of the model."""

    @property
    def pools(self) -> Sequence[Pool]:
        """The competing pools."""
        ...

    def amount(self, target: Target, removed: Counts) -> float:
        """The remaining amount in the target's unit after these removals from every pool."""
        ...

    def budget(self, target: Target) -> float:
        """The largest amount that meets the target."""
        ...


@dataclass(frozen=True)
class BudgetRules:
    """Rules for allocating a budget, as in `Recipe`; `round_to` and `min_units` have an entry for each pool.

    allow_unchanged: whether the unpruned model may meet the target.
    """

    allocation: Allocation
    min_density: float
    round_to: tuple[int, ...]
    min_units: tuple[int, ...]
    equal_widths: bool = False
    allow_unchanged: bool = False


def allocate_budget(
    candidates: Candidates, target: Target, rules: BudgetRules, frozen: Sequence[Frozen], graph: Graph
) -> Counts:
    """Units to remove from every pool: the shortest prefix of the allocation's order that meets the target.

    Errors: TargetMissed if removing all prunable units is not enough, or if nothing would be removed.
    """
    keys = allocate(candidates.pools, rules.allocation)
    limits = zip(keys, rules.round_to, rules.min_units, strict=True)
    ladders = [ladder(key, rules.min_density, multiple, least) for key, multiple, least in limits]
    if isinstance(target, Latency) and isinstance(candidates, CandidateUnits):
        return search_latency(
            ladders,
            candidates.time,
            lambda removed: candidates.amount(MACs(1), removed),
            target,
            equal_widths=rules.equal_widths,
        )
    budget = candidates.budget(target)

    def met(removed: Counts) -> bool:
        return candidates.amount(target, removed) <= budget * (1 + 1e-12)

    counts = solve(ladders, met, equal_widths=rules.equal_widths)
    if counts is None:
        raise _missed(candidates, target, rules, ladders, frozen, graph)
    if not any(counts) and not rules.allow_unchanged and not (isinstance(target, Sparsity) and target.value == 0):
        raise nothing_removed(target, dense=candidates.amount(target, (0,) * len(ladders)), budget=budget)
    return counts


def _missed(
    candidates: Candidates,
    target: Target,
    rules: BudgetRules,
    ladders: Sequence[Ladder],
    frozen: Sequence[Frozen],
    graph: Graph,
) -> TargetMissed:
    sizes, removed = [pool.size for pool in candidates.pools], most(ladders)
    rounding = f", round_to={max(rules.round_to)}" if max(rules.round_to) > 1 else ""
    kept = f"{sum(sizes) - sum(removed)} of {sum(sizes)} are kept (min_density={rules.min_density:g}{rounding})"
    return target_missed(
        target,
        graph,
        frozen,
        dense=candidates.amount(target, (0,) * len(ladders)),
        lowest=candidates.amount(target, removed),
        budget=candidates.budget(target),
        limits=f"{len(sizes)} groups are at their minimum: {kept}",
    )


# -- units of structure --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateUnits:
    """Groups of units as candidates for removal."""

    graph: Graph
    groups: tuple[Group, ...]
    scores: tuple[Scores, ...]
    target: Target | None = None
    """Its unit is that of the costs; without a target each unit costs 1."""
    decided: Mapping[str, Tensor] = field(default_factory=dict)
    """Group -> its kept units, decided independently of the budget."""
    probe: LatencyProbe | None = None
    """Times the model, for `Latency`."""

    @cached_property
    def pools(self) -> list[Pool]:
        """One pool for each group."""
        pairs = zip(self.groups, self.scores, strict=True)
        return [Pool(g.name, s.sort().values, self._shape(g), self._cost(g), self._alike(g)) for g, s in pairs]

    @cached_property
    def _orders(self) -> list[Tensor]:
        return [removal_order(scores) for scores in self.scores]

    def keep(self, removed: Counts) -> dict[str, Tensor]:
        """Group -> which units are kept."""
        keep = dict(self.decided)
        for group, order, count in zip(self.groups, self._orders, removed, strict=True):
            mask = torch.ones(group.size, dtype=torch.bool, device="cpu")
            mask[order[:count]] = False
            keep[group.name] = mask
        return keep

    def amount(self, target: Target, removed: Counts) -> float:
        """The remaining amount of the full model, or of the competing units for `Sparsity`."""
        if _of_units(target):
            return float(sum(group.size for group in self.groups) - sum(removed))
        if isinstance(target, Latency):
            return self.time(removed, False).small
        return weigh(self.graph, target, self.keep(removed))

    def time(self, removed: Counts, again: bool) -> Timing:
        """The time that remains relative to the dense model, for `Latency`."""
        if self.probe is None or not isinstance(self.target, Latency):
            raise RequestError("the latency is not measured", f"the target is {self.target}", "ask for Latency")
        return self.probe.time(self.target, self.keep(removed), again=again)

    def budget(self, target: Target) -> float:
        """Fractions are of the full model; `Sparsity` of the units that compete, or of the weights of the model."""
        nothing = (0,) * len(self.groups)
        return target.absolute(self.amount(target, nothing) if _of_units(target) else weigh(self.graph, target, {}))

    def _cost(self, group: Group) -> float:
        if self.target is None or _of_units(self.target):
            return 1.0
        one_less = torch.arange(group.size, device="cpu") > 0
        return weigh(self.graph, self.target, {}) - weigh(self.graph, self.target, {group.name: one_less})

    def _alike(self, group: Group) -> str:
        """The members of the group and their roles, independent of the width."""
        entities = self.graph.entities
        roles = sorted(f"{m.role}{len(entities[m.entity].shape)}" for m in group.members if m.role != "stat")
        return " ".join([group.kind, *roles])

    def _shape(self, group: Group) -> tuple[int, ...]:
        maker = next((m for m in group.members if m.role == "out"), group.members[0])
        return self.graph.entities[maker.entity].shape


def _of_units(target: Target) -> bool:
    """Whether the target counts units, each as 1."""
    return isinstance(target, Sparsity) and target.of == "prunable"


def weigh(graph: Graph, target: Target, keep: Mapping[str, Tensor]) -> float:
    """The model in the target's unit when only `keep` remains."""
    if isinstance(target, Params):
        return float(graph.params(keep))
    if isinstance(target, Sparsity):
        return model_weights(graph, keep)
    if isinstance(target, MACs | Latency):  # a latency is measured; between measurements multiply-adds guide
        return float(graph.macs(keep))
    return float(graph.bytes(keep))


# -- weights under a mask ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateWeights:
    """Layers whose weights become zero. `scores` are matrices `(out, in)`."""

    graph: Graph
    layers: tuple[Layer, ...]
    scores: tuple[Tensor, ...]
    pattern: Competing

    @cached_property
    def pools(self) -> list[Pool]:
        """One pool for each layer."""
        shapes = [self.graph.entities[layer.entity].shape for layer in self.layers]
        ranked = [pattern.ranked(scores) for pattern, scores in zip(self._patterns, self.scores, strict=True)]
        each = zip(self.layers, ranked, shapes, strict=True)
        return [Pool(x.name, scores, shape, topology=f"{x.op}{shape[2:]}") for x, scores, shape in each]

    @cached_property
    def _patterns(self) -> list[Element | Block | Labelled]:
        if isinstance(self.pattern, Element | Block):
            return [self.pattern] * len(self.layers)
        return [self.pattern.on(shape_of(self.graph, layer)) for layer in self.layers]

    @cached_property
    def _freed(self) -> list[int | Tensor]:
        return [pattern.freed(scores) for pattern, scores in zip(self._patterns, self.scores, strict=True)]

    @cached_property
    def _macs(self) -> dict[str, float]:
        return macs_by_layer(self.graph)

    def masks(self, removed: Counts) -> list[Mask]:
        """The mask of the matrix of every layer."""
        each = zip(self._patterns, self.scores, removed, strict=True)
        return [pattern.mask(scores, count) for pattern, scores, count in each]

    def kept(self, removed: Counts) -> list[int]:
        """Weights that are kept in every layer."""
        pruned = [_pruned(freed, count) for freed, count in zip(self._freed, removed, strict=True)]
        return [scores.numel() - lost for scores, lost in zip(self.scores, pruned, strict=True)]

    def amount(self, target: Target, removed: Counts) -> float:
        """The remaining weights, parameters or multiply-adds; a pruned weight counts 0."""
        kept = self.kept(removed)
        if isinstance(target, MACs):
            spared = [1 - k / s.numel() for k, s in zip(kept, self.scores, strict=True)]
            macs = [self._macs.get(layer.entity, 0.0) for layer in self.layers]
            return self.graph.macs() - sum(m * part for m, part in zip(macs, spared, strict=True))
        if isinstance(target, Bytes):
            todo = "ask for Sparsity, Params or MACs, or prune Channel() or Head()"
            raise RequestError("masks do not change bytes", "zeros are stored like other weights", todo)
        if isinstance(target, Latency):
            todo = "prune Channel(), Head() or Depth(), or ask for Sparsity, Params or MACs"
            raise RequestError("masks do not make a model faster", "dense kernels multiply the zeros too", todo)
        total = sum(scores.numel() for scores in self.scores)
        if isinstance(target, Sparsity):
            return float(sum(kept)) if target.of == "prunable" else model_weights(self.graph, {}) - total + sum(kept)
        return float(self.graph.params() - total + sum(kept))

    def budget(self, target: Target) -> float:
        """For `Sparsity` exactly `round(s * N)` of the N weights are removed, if the pattern allows it."""
        dense = self.amount(target, (0,) * len(self.layers))
        return dense - round(target.value * dense) if isinstance(target, Sparsity) else target.absolute(dense)


def fixed_masks(pattern: Fixed, graph: Graph, layers: Sequence[Layer], scores: Sequence[Tensor]) -> list[Mask]:
    """Masks of a pattern with fixed sparsity, by layer. Errors: RequestError for layers that it does not fit."""
    reasons = {layer.name: pattern.misfit(shape_of(graph, layer)) for layer in layers}
    odd = [name for name, reason in reasons.items() if reason]
    if odd:
        names = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise RequestError(
            f"{pattern.title} does not fit {names}", reasons[odd[0]], f"leave them out: skip={odd[:5]!r}"
        )
    return pattern.masks(scores)


def shape_of(graph: Graph, layer: Layer) -> tuple[int, ...]:
    """The weight of a layer as `(out, in, *kernel)`."""
    return kernel_shape(graph.entities[layer.entity].shape, layer)


def _pruned(freed: int | Tensor, count: int) -> int:
    if isinstance(freed, int):
        return freed * count
    return int(freed[count - 1]) if count else 0
