"""The table of all statistics. One entry describes one statistic.

A criterion requests a statistic by the name of a positional parameter. To add a statistic, add an entry, with the slot
that collects it if it needs data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from prunella import types
from prunella.errors import RequestError, near_names
from prunella.stats import activation, curvature, elimination, gradient, influence, initial, reading, routing
from prunella.stats.subject import Subject

Level = Literal["weight", "unit", "block", "any"]
Layout = Literal["matrix", "row", "stack", "own"]


class Slot(Protocol):
    """Collects one statistic in one pass over the data.

    A slot with `each = True` sees the gradients of one sample at a time: every batch is split along its first axis. A
    slot with `twice = True` has `second(weights, grads)`, called with gradients that can be differentiated again.
    A slot with `begin(batch)` receives each batch before its pass.
    A slot with `again()` is called after each pass over the data and returns whether it needs another one, of which
    only such slots are part; its `once()` is called before the first pass if the data cannot be read again.
    Keyword-only parameters of a slot are knobs. A criterion sets them by its knobs of the same names.
    """

    def watch(self) -> AbstractContextManager[object]:
        """Entered around each forward pass."""
        ...

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Called once per batch, with the gradients by entity, or with an empty mapping."""
        ...

    def result(self) -> dict[str, Tensor]:
        """The statistic, by entity or group name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """The description of one statistic.

    kind: an `Annotated` tensor with the shape and the meaning of the statistic (`prunella.types`).
    level: which objects have a value. `weight`: every weight. `unit`: every channel, head or expert. `block`: every
        residual block. `any`: every unit of any kind, and every weight.
    slot: collects the statistic from data. compute: runs the model without data. With neither, the parameters give the
        statistic.
    gradients: whether the slot needs a loss.
    layout: of the value of one weight, as a criterion sees it. `matrix`: `(out, in)`. `row`: `(in,)` where all rows are
        equal. `stack`: a matrix for each batch or sample. `own`: as collected.
    absent: why a group may lack the statistic.
    """

    kind: Any
    level: Level = "weight"
    slot: Callable[..., Slot] | None = None
    compute: Callable[[Subject], dict[str, Tensor]] | None = None
    gradients: bool = False
    layout: Layout = "matrix"
    absent: str = "which this group does not have"

    @property
    def shape(self) -> str:
        """The shape as text: `(out, in)`."""
        return str(get_args(self.kind)[1])

    @property
    def meaning(self) -> str:
        """The meaning as text."""
        return str(get_args(self.kind)[2])


_NO_ROUTER = "and no router chose among these units: use granularity=Expert()"
STATISTICS: dict[str, Statistic] = {
    # read off the parameters
    "weight": Statistic(kind=types.Weight),
    "unit_weight": Statistic(kind=types.UnitWeight, level="unit", absent="and this group has no weights in its scope"),
    "norm_scale": Statistic(
        kind=types.NormScale, level="unit", absent="and no normalization with a scale acts on these units"
    ),
    "noise": Statistic(kind=types.Noise, level="any"),
    # without data
    "flow": Statistic(kind=types.Flow, compute=initial.flow),
    # forward passes
    "input_norm": Statistic(kind=types.InputNorm, slot=activation.InputNorm, layout="row"),
    "input_var": Statistic(kind=types.InputVar, slot=reading.InputVar),
    "unit_loss": Statistic(
        kind=types.UnitLoss,
        level="unit",
        slot=elimination.UnitLoss,
        absent="and no product of a weight reads these units",
    ),
    "unit_norm": Statistic(kind=types.UnitNorm, level="unit", slot=reading.unit_norm),
    "unit_var": Statistic(kind=types.UnitVar, level="unit", slot=reading.unit_var),
    "unit_zeros": Statistic(kind=types.UnitZeros, level="unit", slot=reading.unit_zeros),
    "unit_rank": Statistic(
        kind=types.UnitRank,
        level="unit",
        slot=reading.unit_rank,
        absent="and no convolution reads these units as maps",
    ),
    "influence": Statistic(
        kind=types.Influence,
        level="block",
        slot=influence.Influence,
        absent="and only residual blocks have it: use granularity=Depth()",
    ),
    "expert_share": Statistic(kind=types.ExpertShare, level="unit", slot=routing.expert_share, absent=_NO_ROUTER),
    "expert_gate": Statistic(kind=types.ExpertGate, level="unit", slot=routing.expert_gate, absent=_NO_ROUTER),
    "expert_output": Statistic(kind=types.ExpertOutput, level="unit", slot=routing.ExpertOutput, absent=_NO_ROUTER),
    # gradients
    "grad": Statistic(kind=types.Grad, slot=gradient.MeanGrad, gradients=True),
    "grad_sq": Statistic(kind=types.GradSq, slot=gradient.MeanSquaredGrad, gradients=True),
    "gate_grad": Statistic(kind=types.GateGrad, level="any", slot=gradient.GateGrad, gradients=True, layout="stack"),
    "sample_grad": Statistic(kind=types.SampleGrad, slot=curvature.SampleGrad, gradients=True, layout="stack"),
    "fisher_diag": Statistic(kind=types.FisherDiag, slot=curvature.FisherDiag, gradients=True),
    "fisher_inverse": Statistic(kind=types.FisherInverse, slot=curvature.FisherInverse, gradients=True, layout="own"),
    "fisher_inverse_diag": Statistic(kind=types.FisherInverseDiag, slot=curvature.fisher_inverse_diag, gradients=True),
    "hessian_diag": Statistic(kind=types.HessianDiag, slot=curvature.HessianDiag, gradients=True),
    "hessian_grad": Statistic(kind=types.HessianGrad, slot=initial.HessianGrad, gradients=True),
    "total_slope": Statistic(kind=types.TotalSlope, slot=initial.TotalSlope, gradients=True),
}


def register_statistic(name: str, statistic: Statistic) -> None:
    """Make a statistic of your own known: a criterion asks for it by a positional parameter of that name.

    name: not taken yet. statistic: what it is, and `compute`, a function of the `Subject` that gives a tensor for each
    weight by its name, or a slot that collects it from data. A plan file names the criterion, not the statistic:
    register it again before the plan is made again. Errors: RequestError for a name that is taken or no identifier.

    Use: criteria that need more than the library collects. Avoid: numbers that follow from known statistics: compute
    them in the criterion.
    """
    if not name.isidentifier() or name in STATISTICS:
        why = "it is there already" if name in STATISTICS else "a parameter of a function has to bear it"
        raise RequestError(f"the name {name!r} cannot be given to a statistic", why, "choose another name")
    if statistic.slot is None and statistic.compute is None:
        why = "nothing says where it comes from"
        raise RequestError(f"the statistic {name} has neither compute= nor slot=", why, "pass compute=")
    STATISTICS[name] = statistic


def why_unknown(name: str) -> str:
    """The names that are near to one that is not a statistic, and all of them."""
    near = near_names(name, STATISTICS)
    return f"{near + ' ' if near else ''}statistics are {', '.join(STATISTICS)}"


def of_level(names: Iterable[str], *levels: Level) -> list[str]:
    """The names whose level is one of `levels`, in order."""
    return [name for name in names if STATISTICS[name].level in levels]
