"""Plans made by hand, for tests that need no pipeline."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prunella.graph.cut.changes import Changes
from prunella.planning.accounting import Amount
from prunella.planning.plan import Plan
from prunella.targets import Sparsity, Target

NOTHING = Amount(0, 0, 0, 0)
HALF = Sparsity(0.5)


def hand_plan(
    *,
    masks: Mapping[str, Tensor] | None = None,
    cuts: Mapping[str, Mapping[int, Tensor]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    target: Target = HALF,
    before: Amount = NOTHING,
) -> Plan:
    """A plan that holds just this."""
    return Plan(
        target=target,
        before=before,
        after=NOTHING,
        masks=masks or {},
        changes=Changes(cuts=cuts or {}),
        weights=weights or {},
    )
