"""Why a budget cannot be met, and advice on how to meet it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prunella.errors import TargetMissed
from prunella.graph.cut.macs import macs_by_parameter
from prunella.graph.data import Frozen, Graph, ReasonKind
from prunella.targets import Sparsity, Target, Threshold

_ADVICE = {
    ReasonKind.COMPLEX: "write a complex layer as real ones, for its real and its imaginary part: those can be pruned",
    ReasonKind.SOURCE: "sizes in the source can follow in a program: prunella.as_program(model, inputs), or --program",
}
"""Advice by kind of reason; other kinds have no remedy, or their text names it."""
_FREES = {
    ReasonKind.SOURCE: "--program",
    ReasonKind.RULE: "a rule: prunella.graph.rules.rule",
    ReasonKind.REQUEST: "another --granularity, --skip or --only",
}


def frees(kind: ReasonKind) -> str:
    """What would free positions frozen for a reason of this kind, in a few words; empty if nothing does."""
    return _FREES.get(kind, "")


def offer(frozen: Iterable[Frozen]) -> str:
    """Advice on how to prune more of the frozen groups; empty without any."""
    kinds = {entry.kind for entry in frozen}
    return "; ".join(advice for kind, advice in _ADVICE.items() if kind in kinds)


def obstacles(graph: Graph, frozen: Sequence[Frozen], limit: int = 6) -> list[str]:
    """The frozen parts with their reasons: blocks first, then the layers with the most multiply-adds."""
    macs = macs_by_parameter(graph)
    sizes = {name: graph.numel(name) for name in graph.entities}
    ranked = sorted(frozen, key=lambda f: (f.axis < 0, macs.get(f.entity, 0.0), sizes.get(f.entity, 0)), reverse=True)
    lines = [f"frozen: {f.place}: {f.reason}{f' ({f.where})' if f.where else ''}" for f in ranked[:limit]]
    return lines + ([f"and {len(ranked) - limit} more frozen axes"] if len(ranked) > limit else [])


def target_missed(
    target: Target,
    graph: Graph,
    frozen: Sequence[Frozen],
    *,
    dense: float,
    lowest: float,
    budget: float,
    limits: str,
) -> TargetMissed:
    """The error of a target beyond reach.

    dense, lowest, budget: amounts of the dense model, of the model without all prunable units, and of the request, in
    the target's unit. limits: the minimum of every group by the recipe.
    """
    reach = 1 - lowest / dense if isinstance(target, Sparsity) else lowest / dense
    budget_text = "" if isinstance(target, Sparsity) else f", asked {budget:.6g}"
    todo = f"ask for {target.name}={reach:.4g} or less removal, lower min_density= or round_to=, or skip less"
    amounts = f"{lowest:.6g} of {dense:.6g}{budget_text}"
    return TargetMissed(
        f"{target} cannot be met: removing all prunable units leaves {target.name}={reach:.4g} ({amounts})",
        "\n".join([limits, *obstacles(graph, frozen)]),
        "; ".join(filter(None, [target.hint, todo, offer(frozen)])),
    )


def nothing_below(threshold: Threshold, scores: Mapping[str, Tensor]) -> TargetMissed:
    """The error of a threshold below every score."""
    name = min(scores, key=lambda name: float(scores[name].min()))
    values = torch.cat([entry.flatten().double().cpu() for entry in scores.values()])
    spread = f"the median is {float(values.median()):.4g}, the highest {float(values.max()):.4g}"
    return TargetMissed(
        f"{threshold} would remove nothing",
        f"the lowest score is {float(values.min()):.4g}, in {name}; {spread}",
        "choose a threshold between these",
    )


def nothing_removed(target: Target, *, dense: float, budget: float) -> TargetMissed:
    """The error of a target that the unpruned model meets."""
    return TargetMissed(
        f"{target} would remove nothing",
        f"the model has {dense:.6g}, and up to {budget:.6g} is allowed",
        "ask for a smaller model",
    )
