"""Training under a constraint by alternating directions: the weights are pulled to their projection on sparse ones."""

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
    """ADMM pruning: a penalty pulls the weights to a sparse copy, which follows them, until both agree.

    Minimise the loss plus `rho / 2 ||W - Z + U||^2` over W for a while, then call `update()`: `Z = P(W + U)`, which
    keeps what a plan for `W + U` keeps, and `U = U + W - Z`. It is a function of the model for the loss. At the end the
    last plan is applied: with `distance` near 0 that changes next to nothing.

        pull = AdmmTraining(model, lambda m: plan(m, batch, recipe, target=Sparsity(0.8)), rho=1e-2)
        for _ in range(rounds):
            finetune(model, data, penalized(loss, pull), steps=200, lr=1e-3); pull.update()
        apply_(model, pull.plan)

    project: a function from a model to a plan, of any granularity: elements, N:M, blocks, channels.
    rho: above 0; large enough it converges, larger is slower for the loss. Usual 1e-4 to 1e-1.

    Data: training. What the plan does not touch is free. Memory: two copies of the weights.

    Use: patterns that one-shot pruning hurts much, with time to train. Avoid: when a gradual `Pruner` does as well.
    """

    def __init__(self, model: nn.Module, project: Projection, *, rho: float = 1e-2) -> None:
        if not rho > 0:
            raise RequestError(f"rho={rho:g} is out of range", "it takes positive numbers", "for example rho=1e-2")
        self.model, self.project, self.rho = unwrap(model), project, rho
        self.copies: dict[str, Tensor] = {}
        self.duals: dict[str, Tensor] = {}
        self.plan = self._project()

    @property
    def distance(self) -> float:
        """`||W - Z||` over all constrained weights."""
        named = parameters(self.model, self.copies)
        squares = [(named[name].detach() - z).double().square().sum() for name, z in self.copies.items()]
        return float(torch.stack(squares).sum().sqrt())

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of `model`, or of a copy of it."""
        named = parameters(model, self.copies)
        pulls = [(named[name] - z + self.duals[name]).square().sum() for name, z in self.copies.items()]
        return torch.stack(pulls).sum() * (self.rho / 2)

    @torch.no_grad()
    def update(self) -> Plan:
        """New sparse copies and duals from the present weights; returns the plan that they follow."""
        self.plan = self._project()
        for name, weight in parameters(self.model, self.copies).items():
            self.duals[name] += weight - self.copies[name]
        return self.plan

    @torch.no_grad()
    def _project(self) -> Plan:
        """`Z = P(W + U)`; parameters that the new plan leaves whole are free again."""
        probe = copied(self.model)
        named = dict(probe.named_parameters())
        for name, dual in self.duals.items():
            named[name].add_(dual)
        made = self.project(probe)
        masks = plan_masks(probe, made)
        chosen = {name: masks[p] for name, p in named.items() if p in masks and not bool(masks[p].all())}
        if not chosen:
            raise RequestError("the plan removes nothing", "there is nothing to pull to", "ask for a smaller model")
        self.copies = {name: named[name].detach() * mask for name, mask in chosen.items()}
        self.duals = {name: self.duals.get(name, torch.zeros_like(z)) for name, z in self.copies.items()}
        return made
