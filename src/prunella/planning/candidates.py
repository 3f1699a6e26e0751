"""What competes for a budget (units of structure, or weights), how it is measured, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from prunella.allocation.pool import Allocation, Pool
from prunella.errors import RequestError, TargetMissed
from prunella.granularity import Block, Competing, Element, Fixed
from prunella.graph.cut.macs import macs_by_layer
from prunella.graph.data import Frozen, Graph, Group, Layer
from prunella.graph.matrix import kernel_shape
from prunella.measure.timing import Timing
from prunella.planning.budget import Ladder, allocate, ladder, most, solve
from prunella.planning.latency import Stopwatch, paced
from prunella.selection import Counts, removal_order
from prunella.targets import Bytes, Latency, MACs, Params, Sparsity, Target
from prunella.types import Mask, Scores


class Contest(Protocol):
    """Pools that shrink, and what is left of the model when they do."""

    @property
    def pools(self) -> Sequence[Pool]:
        """Who competes."""
        ...

    def amount(self, target: Target, removed: Counts) -> float:
        """What remains, in the target's unit, when so many steps are removed from every pool."""
        ...

    def budget(self, target: Target) -> float:
        """The largest amount that meets the target."""
        ...


@dataclass(frozen=True)
class Rules:
    """How a budget is shared out: see `Recipe`. least: units of every pool that stay; idle: it may be met as it is."""

    allocation: Allocation
    floor: float
    align: tuple[int, ...]
    even: bool = False
    least: tuple[int, ...] = ()
    idle: bool = False


def share(contest: Contest, target: Target, rules: Rules, frozen: Sequence[Frozen], graph: Graph) -> Counts:
    """Steps to remove from every pool: the shortest prefix of the allocation's order that meets the target.

    Errors: TargetMissed when even everything that may go is not enough, or when nothing would go.
    """
    keys = allocate(contest.pools, rules.allocation)
    least = rules.least or (1,) * len(keys)
    ladders = [ladder(key, rules.floor, *rest) for key, *rest in zip(keys, rules.align, least, strict=True)]
    if isinstance(target, Latency) and isinstance(contest, Units):
        return paced(ladders, contest.time, lambda gone: contest.amount(MACs(1), gone), target, even=rules.even)
    budget = contest.budget(target)
    counts = solve(ladders, lambda removed: contest.amount(target, removed) <= budget * (1 + 1e-12), even=rules.even)
    if counts is None:
        raise _missed(contest, target, rules, ladders, frozen, graph)
    if not any(counts) and not rules.idle and not (isinstance(target, Sparsity) and target.value == 0):
        raise _nothing(contest, target)
    return counts


# -- units of structure --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Groups of units that leave the model."""

    graph: Graph
    groups: tuple[Group, ...]
    scores: tuple[Scores, ...]
    target: Target
    decided: Mapping[str, Tensor] = field(default_factory=dict)
    """Group -> what stays of it, whatever the budget."""
    clock: Stopwatch | None = None
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
        """Group -> which units stay."""
        kept = dict(self.decided)
        for group, order, count in zip(self.groups, self._orders, removed, strict=True):
            stays = torch.ones(group.size, dtype=torch.bool)
            stays[order[:count]] = False
            kept[group.name] = stays
        return kept

    def amount(self, target: Target, removed: Counts) -> float:
        """What remains of the whole model, or of the units that compete for `Sparsity`."""
        if isinstance(target, Sparsity):
            return float(sum(group.size for group in self.groups) - sum(removed))
        if isinstance(target, Latency):
            return self.time(removed, False).small
        return weigh(self.graph, target, self.keep(removed))

    def time(self, removed: Counts, again: bool) -> Timing:
        """What is left against the dense model, for `Latency`."""
        if self.clock is None or not isinstance(self.target, Latency):
            raise RequestError("nothing times this model", f"the target is {self.target}", "ask for Latency")
        return self.clock.time(self.target, self.keep(removed), again=again)

    def budget(self, target: Target) -> float:
        """Fractions are of the whole model; `Sparsity` of the units that compete."""
        nothing = (0,) * len(self.groups)
        return target.absolute(
            self.amount(target, nothing) if isinstance(target, Sparsity) else weigh(self.graph, target, {})
        )

    def _cost(self, group: Group) -> float:
        if isinstance(self.target, Sparsity):
            return 1.0
        one_less = torch.arange(group.size) > 0
        return weigh(self.graph, self.target, {}) - weigh(self.graph, self.target, {group.name: one_less})

    def _alike(self, group: Group) -> str:
        """What takes part in the group and in which role; not how wide it is."""
        entities = self.graph.entities
        roles = sorted(f"{m.role}{len(entities[m.entity].shape)}" for m in group.members if m.role != "stat")
        return " ".join([group.kind, *roles])

    def _shape(self, group: Group) -> tuple[int, ...]:
        maker = next((m for m in group.members if m.role == "out"), group.members[0])
        return self.graph.entities[maker.entity].shape


def weigh(graph: Graph, target: Target, keep: Mapping[str, Tensor]) -> float:
    """The model in the target's unit when only `keep` remains."""
    if isinstance(target, Params):
        return float(graph.params(keep))
    if isinstance(target, MACs | Latency):  # a latency is measured; between measurements multiply-adds guide
        return float(graph.macs(keep))
    return float(graph.bytes(keep))


# -- weights under a mask ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
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
        found = zip(self.layers, ranked, shapes, strict=True)
        return [Pool(x.name, scores, shape, alike=f"{x.op}{shape[2:]}") for x, scores, shape in found]

    @cached_property
    def _patterns(self) -> list[Element | Block]:
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
        """What is kept of every layer's matrix."""
        each = zip(self._patterns, self.scores, removed, strict=True)
        return [pattern.mask(scores, count) for pattern, scores, count in each]

    def kept(self, removed: Counts) -> list[int]:
        """Weights that stay in every layer."""
        gone = [_gone(freed, count) for freed, count in zip(self._freed, removed, strict=True)]
        return [scores.numel() - lost for scores, lost in zip(self.scores, gone, strict=True)]

    def amount(self, target: Target, removed: Counts) -> float:
        """Weights, parameters or multiply-adds that remain; a pruned weight counts as nothing."""
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
        return float(sum(kept) if isinstance(target, Sparsity) else self.graph.params() - total + sum(kept))

    def budget(self, target: Target) -> float:
        """For `Sparsity` exactly `round(s * N)` weights go, where the pattern allows it."""
        dense = self.amount(target, (0,) * len(self.layers))
        return dense - round(target.value * dense) if isinstance(target, Sparsity) else target.absolute(dense)


def fixed_masks(pattern: Fixed, graph: Graph, layers: Sequence[Layer], scores: Sequence[Tensor]) -> list[Mask]:
    """Masks of a pattern that leaves nothing to share out, by layer. RequestError for layers it does not fit."""
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


def _gone(freed: int | Tensor, count: int) -> int:
    if isinstance(freed, int):
        return freed * count
    return int(freed[count - 1]) if count else 0


def _missed(
    contest: Contest, target: Target, rules: Rules, ladders: Sequence[Ladder], frozen: Sequence[Frozen], graph: Graph
) -> TargetMissed:
    nothing = (0,) * len(ladders)
    dense, least = contest.amount(target, nothing), contest.amount(target, most(ladders))
    reach = 1 - least / dense if isinstance(target, Sparsity) else least / dense
    asked = "" if isinstance(target, Sparsity) else f", asked {contest.budget(target):.6g}"
    sizes = [pool.size for pool in contest.pools]
    stay = [size - gone for size, gone in zip(sizes, most(ladders), strict=True)]
    floors = f"{len(sizes)} groups are at their floor: {sum(stay)} of {sum(sizes)} stay (floor={rules.floor:g}"
    floors += f", align={max(rules.align)})" if max(rules.align) > 1 else ")"
    helps = [offer(frozen)] if offer(frozen) else []
    return TargetMissed(
        f"{target} cannot be met: all that may go leaves {target.name}={reach:.4g} ({least:.6g} of {dense:.6g}{asked})",
        "\n".join([floors, *obstacles(graph, frozen)]),
        "; ".join([f"ask for {target.name}={reach:.4g} or less removal, lower floor= or align=, or skip less", *helps]),
    )


def _nothing(contest: Contest, target: Target) -> TargetMissed:
    dense = contest.amount(target, (0,) * len(contest.pools))
    return TargetMissed(
        f"{target} would remove nothing",
        f"the model has {dense:.6g}, and up to {contest.budget(target):.6g} is allowed",
        "ask for a smaller model",
    )


def obstacles(graph: Graph, frozen: Sequence[Frozen], limit: int = 6) -> list[str]:
    """What may not be pruned and why, blocks first, then the layers with the most multiply-adds."""
    macs = {layer.entity: layer.macs for layer in graph.layers}
    sizes = {name: graph.numel(name) for name in graph.entities}
    ranked = sorted(frozen, key=lambda f: (f.axis < 0, macs.get(f.entity, 0.0), sizes.get(f.entity, 0)), reverse=True)
    lines = [f"frozen: {f.place}: {f.reason}{f' ({f.where})' if f.where else ''}" for f in ranked[:limit]]
    return lines + ([f"and {len(ranked) - limit} more frozen axes"] if len(ranked) > limit else [])


_BY_SOURCE = ("typed into the source", "in the source would not follow", "used in a calculation", "sizes come from")


def offer(frozen: Iterable[Frozen]) -> str:
    """What helps where the source keeps sizes whole, which a program does not; empty where nothing of that kind is."""
    held = any(words in item.reason for item in frozen for words in _BY_SOURCE)
    return "sizes in the source can follow in a program: prunella.as_program(model, inputs), or --program" * held
