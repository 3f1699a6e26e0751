"""Training under a sparsity constraint by ADMM: a penalty on the distance of the weights to a sparse projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.copying import copied
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import training
from prunella.train.penalty.units import parameters
from prunella.transform.apply import plan_masks

Projection = Callable[[nn.Module], Plan]
"""A function from a model to a plan, whose masks and cuts say which weights may be non-zero."""


@training(source="Zhang et al. 2018, arXiv:1804.03294; Boyd et al. 2011, doi:10.1561/2200000016")
class AdmmTraining:
    """ADMM pruning: a penalty moves the weights to a sparse target, and the target is updated, until both agree.

    Minimize the loss plus `rho / 2 ||W - Z + U||^2` over W for some steps, then call `update()`: `Z = P(W + U)`, which
    keeps the weights that a plan for `W + U` keeps, and `U = U + W - Z`. The object is a function of the model, a term
    for the loss. At the end apply the last plan: with `distance` near 0 the weights hardly change.

        admm = AdmmTraining(model, lambda m: plan(m, batch, recipe, target=Sparsity(0.8)), rho=1e-2)
        for _ in range(rounds):
            finetune(model, data, penalized(loss, admm), steps=200, lr=1e-3); admm.update()
        apply_(model, admm.plan)

    project: a function from a model to a plan, of any granularity: elements, N:M, blocks, channels.
    rho: above 0; ADMM converges if rho is large enough, and the loss falls more slowly for larger rho. Usual 1e-4 to
    1e-1.

    Data: training. Parameters that the plan does not prune have no penalty. Memory: two copies of the weights.

    Use: patterns that one-shot pruning harms strongly, with time to train. Avoid: when a gradual `Pruner` is as good.
    """

    def __init__(self, model: nn.Module, project: Projection, *, rho: float = 1e-2) -> None:
        if not rho > 0:
            raise RequestError(f"rho={rho:g} is out of range", "it takes positive numbers", "for example rho=1e-2")
        self.model, self.project, self.rho = unwrap(model), project, rho
        self.targets: dict[str, Tensor] = {}
        self.duals: dict[str, Tensor] = {}
        self.plan = self._project()

    @property
    def distance(self) -> float:
        """`||W - Z||` over all constrained weights."""
        named = parameters(self.model, self.targets)
        squares = [(named[name].detach() - z).double().square().sum() for name, z in self.targets.items()]
        return float(torch.stack(squares).sum().sqrt())

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of `model`, or of a copy of it."""
        named = parameters(model, self.targets)
        squares = [(named[name] - z + self.duals[name]).square().sum() for name, z in self.targets.items()]
        return torch.stack(squares).sum() * (self.rho / 2)

    @torch.no_grad()
    def update(self) -> Plan:
        """Update the sparse targets and the duals from the present weights; returns the new plan."""
        self.plan = self._project()
        for name, weight in parameters(self.model, self.targets).items():
            self.duals[name] += weight - self.targets[name]
        return self.plan

    @torch.no_grad()
    def _project(self) -> Plan:
        """`Z = P(W + U)`; parameters that the new plan does not prune have no target."""
        probe = copied(self.model)
        named = dict(probe.named_parameters())
        for name, dual in self.duals.items():
            named[name].add_(dual)
        plan = self.project(probe)
        masks = plan_masks(probe, plan)
        pruned_masks = {name: masks[p] for name, p in named.items() if p in masks and not bool(masks[p].all())}
        if not pruned_masks:
            raise RequestError("the plan removes nothing", "so that ADMM has no target", "ask for a smaller model")
        self.targets = {name: named[name].detach() * mask for name, mask in pruned_masks.items()}
        self.duals = {name: self.duals.get(name, torch.zeros_like(z)) for name, z in self.targets.items()}
        return plan
