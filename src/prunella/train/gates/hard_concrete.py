"""L0 regularization: gates that are exactly zero with a learned probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.registry.method import training
from prunella.train.gates.gate import Gate, M, Noisy, attach_
from prunella.train.penalty.units import CoupledUnits, Slice, broadcast

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature, and the interval to which the concrete variable is stretched before it is clamped to [0, 1]."""


class HardConcrete(Gate, Noisy):
    """Hard concrete variables. weights: how many numbers each gate opens or closes."""

    log_alpha: nn.Parameter
    weights: Tensor

    def __init__(self, weights: Tensor, start: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full(weights.shape, float(start), device=weights.device))
        self.register_buffer("weights", weights.to(torch.float32), persistent=False)
        self.noise = torch.full_like(self.log_alpha.detach(), 0.5)

    def draw(self) -> None:
        """Uniform noise, away from 0 and 1."""
        tiny = torch.finfo(self.log_alpha.dtype).eps
        self.noise = torch.rand_like(self.log_alpha.detach()).clamp(tiny, 1 - tiny)

    def value(self) -> Tensor:
        """The gates: with noise in training, without it in evaluation."""
        if self.training:
            noise = self.noise.to(self.log_alpha)
            level = torch.sigmoid((noise.log() - (1 - noise).log() + self.log_alpha) / BETA)
        else:
            level = torch.sigmoid(self.log_alpha)
        return (level * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def alive(self) -> Tensor:
        """Probability that a gate is not zero."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA))

    def cost(self, weight: Tensor) -> Tensor:
        """Expected number of weights that are not zero."""
        return (self.alive() * self.weights).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight; it has the shape of the gates."""
        return weight * self.value().to(weight)


class Opened(nn.Module):
    """One slice of a weight under the gates of a group's units; all slices share the gates."""

    def __init__(self, gate: HardConcrete, part: Slice) -> None:
        super().__init__()
        self.gate, self.part = gate, part

    def forward(self, weight: Tensor) -> Tensor:
        """Each position times the gate of its unit."""
        return weight * broadcast(weight, self.part, self.gate.value())


@training(source="Louizos et al. 2018, arXiv:1712.01312")
def l0_gates_(model: M, units: CoupledUnits, *, per_weight: bool = False, start: float = 2.5) -> M:
    """L0 regularization by hard concrete gates, on coupled units or on single weights, in place.

    `z = clamp(s (zeta - gamma) + gamma, 0, 1)`, `s = sigmoid((log u - log(1 - u) + log_alpha) / beta)` with u uniform,
    beta = 2/3, gamma = -0.1, zeta = 1.1; in evaluation `s = sigmoid(log_alpha)`, without noise. The penalty
    `gate_penalty` is the expected number of weights: `sum of p sigmoid(log_alpha - beta log(-gamma / zeta))`.
    A unit has one gate. The gate multiplies all columns that read the unit, so that a closed unit is removed exactly:
    `merge_gates_(model)`, then `plan_zeros` and `shrink`. Groups that no weight reads, such as queries with keys, get
    no gate. Noise is drawn once per pass from torch's generator.

    per_weight: a gate for each weight of the layers instead of each unit; then `plan_zeros(..., Element())`.
    start: of log_alpha; from log(11) = 2.4 up the gates do not change the output in evaluation mode.

    Data: none of its own. Caveats: gates need a larger learning rate than weights, 0.01 to 0.1, and a penalty from
    1e-6 to 1e-3 per weight; all gates of a group may close, and `plan_zeros` then keeps the minimum of units.
    units: from `coupled_units`. Errors: RequestError for a start that is not finite, NotSupported without units.

    Use: structure that the loss itself chooses, in long training. Avoid: an exact budget, or training for a few steps.
    """
    if not math.isfinite(start):
        raise RequestError(f"start={start} is out of range", "log_alpha is a finite number", "2.5 opens, 0 half")
    named = units.named(model)
    if per_weight:
        full_gates = {x.entity: torch.ones_like(named[x.entity].detach()) for x in units.layers}
        return attach_(model, {name: [HardConcrete(one, start)] for name, one in full_gates.items()})
    gates: dict[str, list[nn.Module]] = {}
    for group in units.groups:
        readers = [part for part in group.slices if part.role == "in"]
        if readers and bool(torch.bincount(torch.cat([p.unit for p in readers]), minlength=group.size).all()):
            gate = HardConcrete(group.weights.to(named[readers[0].name].device), start)
            for part in readers:
                gates.setdefault(part.name, []).append(Opened(gate, part))
    if not gates:
        raise NotSupported("there are no units to gate", "no weight reads the prunable units", "per_weight=True")
    return attach_(model, gates)
