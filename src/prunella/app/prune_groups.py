"""The groups that `prune` may cut, and their steps: inner groups first, residual streams only if necessary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.criteria import group_norm
from prunella.errors import NotSupported
from prunella.graph.data import Frozen, Group, ReasonKind
from prunella.graph.verify import unproven
from prunella.model.forward import forward
from prunella.model.observed_reads import Read
from prunella.model.watch import Watch
from prunella.planning.budget import Ladder, ladder, most
from prunella.planning.candidates import CandidateUnits
from prunella.planning.diagnostics import nothing_removed, target_missed
from prunella.planning.request import Request, eligible_groups, nothing_to_prune, score_groups, set_aside
from prunella.selection import Counts
from prunella.targets import Latency, MACs, Target

MIN_DENSITY = 0.1
"""Smallest fraction of a group's units that is kept, as long as the target can be met."""


STEPS = ((32, 8), (16, 4))
"""Pairs of a smallest width and the multiple to which widths from there on are rounded."""


@dataclass(frozen=True)
class Scope:
    """Groups that may be cut. norms: scores by weights alone. ladders: the steps of each group. rounded: whether widths
    are rounded for hardware. frozen: axes that are not cut, with reasons."""

    groups: tuple[Group, ...]
    norms: Mapping[str, Tensor]
    ladders: tuple[Ladder, ...]
    frozen: tuple[Frozen, ...]
    rounded: bool
    streams: bool

    def levels(self, index: int) -> list[int]:
        """The possible numbers of removed units of one group."""
        steps = self.ladders[index]
        return [steps.removed(step) for step in range(len(steps.keys) + 1)]

    def without(self, faults: Mapping[str, str]) -> Scope:
        """The scope without groups whose cut cannot be proven."""
        kept = [index for index, group in enumerate(self.groups) if group.name not in faults]
        aside = [set_aside(g, faults[g.name], ReasonKind.UNPROVEN) for g in self.groups if g.name in faults]
        groups, ladders = (tuple(values[index] for index in kept) for values in (self.groups, self.ladders))
        return replace(self, groups=groups, ladders=ladders, frozen=(*self.frozen, *aside))  # type: ignore[arg-type]


def scope_of(request: Request, targets: Sequence[Target]) -> Scope:
    """The first scope in which all targets can be met: inner groups, then all; each first with widths for hardware.

    A tenth of the units of each group is kept, if the targets can be met so. Errors: NotSupported if nothing can be
    pruned; TargetMissed if a target is out of reach, or met by the dense model.
    """
    scored, frozen = _scored(request)
    streams = residual_streams(request.model, [group for group, _ in scored], request.inputs)
    norms = {group.name: norm for group, norm in scored}
    groups = tuple(group for group, _ in scored)
    inner = tuple(group for group in groups if group.name not in streams)
    _check_removal(request, groups, targets)
    aside = [set_aside(g, "a residual stream, which is cut last", ReasonKind.REQUEST) for g in groups if g not in inner]
    tries = [(inner, rounded, MIN_DENSITY) for rounded in (True, False)]
    tries += [(groups, rounded, MIN_DENSITY) for rounded in (True, False)] + [(groups, False, 0.0)]
    for chosen, rounded, density in tries:
        ladders = tuple(_ladder(group, rounded, density) for group in chosen)
        left_out = frozen if chosen is groups else [*frozen, *aside]
        scope = Scope(chosen, norms, ladders, tuple(left_out), rounded, chosen is groups and bool(streams))
        if chosen and reachable(request, scope, targets):
            return scope
    raise missed(request, scope, targets)


def _candidates(request: Request, groups: Sequence[Group]) -> CandidateUnits:
    """The units in index order, for costs, which do not depend on the order."""
    return CandidateUnits(
        request.graph, tuple(groups), tuple(torch.arange(group.size, device="cpu") for group in groups)
    )


def reachable(request: Request, scope: Scope, targets: Sequence[Target]) -> bool:
    """Whether the groups at their minimum meet every target, apart from a latency, which has to be measured."""
    candidates = _candidates(request, scope.groups)
    return all(over(candidates, target, most(scope.ladders)) <= 1 for target in targets)


def over(candidates: CandidateUnits, target: Target, counts: Counts) -> float:
    """The remaining amount relative to the budget of a target, which is met up to 1. A latency counts as 0."""
    if isinstance(target, Latency):
        return 0.0
    return candidates.amount(target, counts) / (candidates.budget(target) * (1 + 1e-12))


def missed(request: Request, scope: Scope, targets: Sequence[Target]) -> Exception:
    """The error of the first target beyond reach."""
    candidates = _candidates(request, scope.groups)
    counts = most(scope.ladders)
    target = next((t for t in targets if over(candidates, t, counts) > 1), targets[0])
    target = MACs(target.value) if isinstance(target, Latency) else target
    kept, total = sum(g.size for g in scope.groups) - sum(counts), sum(g.size for g in scope.groups)
    return target_missed(
        target,
        request.graph,
        scope.frozen,
        dense=candidates.amount(target, (0,) * len(counts)),
        lowest=candidates.amount(target, counts),
        budget=candidates.budget(target),
        limits=f"{len(counts)} groups are at their minimum: {kept} of {total} units are kept",
    )


def residual_streams(model: nn.Module, groups: Sequence[Group], inputs: Any) -> set[str]:
    """Groups of positions to which several blocks add their outputs.

    A layer reads the group before another one adds to it: `x + f(x)`. A residual width of a transformer always is one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in parameters.items()}
    calls: list[tuple[str, bool]] = []

    def note(read: Read) -> None:
        calls.append((names[id(read.weight)], read.residual is not None))

    members = {m.entity for group in groups for m in group.members if m.role in ("in", "out")}
    watch = Watch([p for name in members if isinstance(p := parameters.get(name), nn.Parameter)], note)
    with torch.no_grad(), watch:
        forward(model, inputs)
    watch.finish()
    return {group.name for group in groups if group.kind == "width" or _adds_to_itself(group, calls)}


def _adds_to_itself(group: Group, calls: Sequence[tuple[str, bool]]) -> bool:
    roles = {role: {m.entity for m in group.members if m.role == role} for role in ("in", "out")}
    first = next((k for k, (name, _) in enumerate(calls) if name in roles["in"]), len(calls))
    return any(name in roles["out"] and added for name, added in calls[first:])


def _scored(request: Request) -> tuple[list[tuple[Group, Tensor]], list[Frozen]]:
    """Groups with a norm for each unit and a cut by half that the oracle proves, and the frozen axes."""
    groups, frozen = eligible_groups(request)
    by_norm = replace(request, recipe=replace(request.recipe, criterion=group_norm))
    scored = []
    for group in groups:
        try:
            scores, frozen = score_groups(by_norm, [group], frozen)
            scored += scores
        except NotSupported as error:
            reason = error.why.splitlines()[0] if error.why else error.what
            frozen = [*frozen, set_aside(group, reason, ReasonKind.UNSCORED)]
    half = {
        g.name: torch.arange(g.size, device="cpu") >= min(g.size // 2, g.size - max(1, g.min_units)) for g, _ in scored
    }
    faults = unproven(request.model, request.graph, half, request.inputs)
    frozen = [*frozen, *(set_aside(g, faults[g.name], ReasonKind.UNPROVEN) for g, _ in scored if g.name in faults)]
    scored = [(group, norm) for group, norm in scored if group.name not in faults]
    if not scored:
        raise nothing_to_prune(request, "units", frozen)
    return scored, frozen


def _check_removal(request: Request, groups: Sequence[Group], targets: Sequence[Target]) -> None:
    """Errors: TargetMissed if the dense model meets all targets."""
    candidates = _candidates(request, groups)
    nothing = (0,) * len(groups)
    if all(not isinstance(target, Latency) and over(candidates, target, nothing) <= 1 for target in targets):
        target = targets[0]
        raise nothing_removed(target, dense=candidates.amount(target, nothing), budget=candidates.budget(target))


def _ladder(group: Group, rounded: bool, min_density: float) -> Ladder:
    """In steps of `STEPS` if `rounded`."""
    step = next((step for width, step in STEPS if group.size >= width), 1) if rounded else 1
    step = step if group.kind in ("channel", "width") else 1
    ranks = torch.arange(group.size, dtype=torch.float64, device="cpu")
    return ladder(ranks, min_density, math.lcm(group.multiple, step), group.min_units)
