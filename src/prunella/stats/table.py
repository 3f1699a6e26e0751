"""Every statistic that a criterion may ask for: one entry says all that the library knows of it.

A criterion asks by the name of a positional parameter. To add a statistic, add an entry; where it takes data, name the
slot that collects it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from prunella import types
from prunella.stats import activation, curvature, gradient, influence, initial, reading, routing
from prunella.stats.subject import Subject

Level = Literal["weight", "unit", "block", "any"]
Layout = Literal["matrix", "row", "stack", "own"]


class Slot(Protocol):
    """Collects one statistic in one pass over the data.

    A slot with `each = True` sees the gradients of one sample at a time: every batch is split along its first axis. One
    with `twice = True` has `second(weights, grads)`, called with gradients that can be differentiated again.
    Keyword-only parameters of a slot are knobs: a criterion that has a knob of the same name sets it.
    """

    def watch(self) -> AbstractContextManager[object]:
        """Entered around each forward pass."""
        ...

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Called once a batch, with the gradients by entity, or with nothing."""
        ...

    def result(self) -> dict[str, Tensor]:
        """The statistic, by entity or group name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """What the library knows of one statistic.

    kind: an `Annotated` tensor, which says its shape and its meaning (`prunella.types`).
    level: what has a value. `weight`: every weight. `unit`: every channel, head or expert. `block`: every residual
        block. `any`: every unit of any kind, and every weight.
    slot: collects it from data. compute: runs the model without data. With neither it is read off the parameters.
    gradients: whether the slot needs a loss.
    layout: how a criterion sees the value of one weight. `matrix`: `(out, in)`. `row`: `(in,)` where all rows are
        equal. `stack`: a matrix for each batch or sample. `own`: as collected.
    absent: why a group may be without it.
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
        """For people: `(out, in)`."""
        return str(get_args(self.kind)[1])

    @property
    def meaning(self) -> str:
        """In words."""
        return str(get_args(self.kind)[2])


_NO_ROUTER = "and no router was seen to choose among these units: use granularity=Expert()"
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


def of_level(names: Iterable[str], *levels: Level) -> list[str]:
    """Those of the names whose level is one of these, in order."""
    return [name for name in names if STATISTICS[name].level in levels]
