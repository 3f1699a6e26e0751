"""A fixed number of kept units per group, with learned units: Lagrange multipliers enforce it on the gates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunella.errors import RequestError
from prunella.model.unwrap import unwrap
from prunella.registry.method import training
from prunella.train.gates.hard_concrete import HardConcrete, Opened
from prunella.train.penalty.units import CoupledUnits, Units

CLOSED = -20.0
"""A `log_alpha` that makes a gate exactly 0 in evaluation mode."""


@training(source="Xia et al. 2024, arXiv:2310.06694 (Sheared LLaMA)")
class TargetShape:
    """Train the gates of every group to a given expected number of open units, then close the others exactly.

    `L = sum_g a_g c_g + b_g c_g^2`, `c_g = (sum_u P(z_u != 0) - n_g) / size_g`, added to the loss; after each optimizer
    step the multipliers rise, `a_g += rate * c_g` and `b_g += rate * c_g^2`, until the constraint holds (c to 0).
    The kept units are learned, the shape is given. Data: none of its own.

        l0_gates_(model, units)
        shape = TargetShape(units, {"layer1": 32, "layer2": 48})
        finetune(model, data, penalized(loss, shape.penalty), ..., on_step=lambda *_: shape.step(model))
        shape.close_(model); merge_gates_(model); plan = plan_zeros(model, batch)      # 32 and 48 units are kept

    units: the same as for `l0_gates_`. shape: group name -> kept units, from 1 up. rate: of the multipliers, above 0;
    0.1 to 1 for some hundred steps.

    Use: before distillation, when the smaller model must have a given shape. Avoid: a budget of multiply-adds without a
    given shape: `plan` with a criterion spends it better.
    """

    def __init__(self, units: CoupledUnits, shape: Mapping[str, int], *, rate: float = 0.3) -> None:
        self.groups = {group.name: group for group in units.groups}
        for name, kept in shape.items():
            if name not in self.groups or not 1 <= kept <= self.groups[name].size:
                known = ", ".join(f"{group.name} ({group.size})" for group in units.groups)
                raise RequestError(f"the shape {name}={kept} is not one of this model", f"groups are {known}")
        if not (shape and 0 < rate < math.inf):
            what = f"rate={rate:g} with {len(shape)} groups is out of range"
            raise RequestError(what, "the rate and the number of groups are above 0", "rate=0.3")
        self.shape, self.rate = dict(shape), rate
        self.multipliers = dict.fromkeys(shape, (0.0, 0.0))

    def penalty(self, model: nn.Module) -> Tensor:
        """The term to add to the loss."""
        parts = []
        for name, gap in self._gaps(model).items():
            first, second = self.multipliers[name]
            parts.append(first * gap + second * gap.square())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def step(self, model: nn.Module) -> dict[str, float]:
        """Raise the multipliers; returns for each group its excess of open units, relative to its size."""
        gaps = {name: float(gap) for name, gap in self._gaps(model).items()}
        for name, gap in gaps.items():
            first, second = self.multipliers[name]
            self.multipliers[name] = first + self.rate * gap, second + self.rate * gap**2
        return gaps

    @torch.no_grad()
    def close_(self, model: nn.Module) -> None:
        """Keep the highest gates of each group open and close the others, in place: exactly the shape remains."""
        for name, kept in self.shape.items():
            alpha = self._gate(model, self.groups[name]).log_alpha
            order = alpha.argsort(descending=True, stable=True)
            alpha[order[kept:]] = CLOSED
            alpha[order[:kept]] = alpha[order[:kept]].clamp_min(0)

    def _gaps(self, model: nn.Module) -> dict[str, Tensor]:
        gaps = {}
        for name, kept in self.shape.items():
            group = self.groups[name]
            gaps[name] = (self._gate(model, group).alive().sum() - kept) / group.size
        return gaps

    def _gate(self, model: nn.Module, group: Units) -> HardConcrete:
        """The gate of a group in this copy of the model."""
        for part in (part for part in group.slices if part.role == "in"):
            path, _, leaf = part.name.rpartition(".")
            module = unwrap(model).get_submodule(path)
            chains = module.parametrizations if parametrize.is_parametrized(module, leaf) else None
            for gate in chains[leaf].children() if isinstance(chains, nn.ModuleDict) else ():
                if isinstance(gate, Opened) and gate.part.axis == part.axis and gate.part.index.equal(part.index):
                    return gate.gate
        why = "the model carries no gates, or merge_gates_ removed them"
        raise RequestError(f"{group.name} has no gate", why, "call l0_gates_(model, units) first")
