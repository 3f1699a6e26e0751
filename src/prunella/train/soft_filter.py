"""Soft filter pruning: filters are set to zero after every epoch, but are trained until the end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.model.unwrap import unwrap
from prunella.model.weight_norm import scaled_by_norm
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import training
from prunella.targets import Sparsity
from prunella.train.pruner import Planner, planner_of
from prunella.transform.apply import apply_, plan_masks
from prunella.types import Inputs


@training(source="He et al. 2018, arXiv:1808.06866 (soft filter pruning)")
class SoftFilterPruner:
    """Set the units that the newest plan removes to zero after every epoch, but train them; the last plan is final.

        pruner = SoftFilterPruner(model, batch, recipe=Recipe(), target=Sparsity(0.3))
        for epoch in range(epochs):
            train(model); pruner.step()
        small = shrink(model, pruner.finish())

    Channels: only the rows that produce a unit are zeroed, `W_j = 0`. Bias, normalization and readers are kept: a unit
    with zeros on both sides would get no gradient and could never come back. Masks of weights: the weights are zeroed
    and no mask is kept. At the end `finish` plans once more and permanently zeroes everything that the plan removes;
    `shrink` is then exact. A zeroed unit whose bias or shift is not positive gets no gradient before a ReLU, and stays
    zero.
    recipe: a `Recipe`, or a function from target to plan where planning needs data.

    Use: training from scratch, or long fine-tuning, before removing channels. Avoid: short training: a zeroed unit
    needs epochs to come back.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, recipe: Recipe | Planner, target: Sparsity) -> None:
        self.model, self.target = model, target
        self._inputs = inputs
        self._graph: Graph | None = None
        self._planner = planner_of(model, recipe, inputs)

    def step(self) -> Plan:
        """After an epoch: plan, and zero what the plan removes. The masks of the model are not changed."""
        plan = self._plan()
        root = unwrap(self.model)
        named = dict(root.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for parameter, mask in plan_masks(root, replace(plan, changes=replace(plan.changes, cuts={}))).items():
                parameter.masked_fill_(~mask, 0)
            for entity, axis, removed in self._rows(plan):
                named[entity].index_fill_(axis, removed.to(named[entity].device), 0)
        return plan

    def finish(self) -> Plan:
        """After the last epoch: plan, zero the removed units with all coupled weights, keep the masks; the plan."""
        plan = self._plan()
        apply_(self.model, plan, regrow=True)
        return plan

    def _plan(self) -> Plan:
        assert self._planner is not None
        return self._planner(self.target)

    def _rows(self, plan: Plan) -> list[tuple[str, int, Tensor]]:
        """Entity, axis and positions of the rows that produce the removed units."""
        if not plan.keep:
            return []
        if self._graph is None:
            self._graph = couple(unwrap(self.model), self._inputs)
        rows, scaled = [], scaled_by_norm(self.model)
        for name, kept in plan.keep.items():
            for member in self._graph.group(name).members:
                removed = torch.from_numpy(member.index)[~kept[torch.from_numpy(member.unit)]]
                if member.role == "out" and len(removed):
                    by_norm = scaled.get(member.entity)
                    rows.append((by_norm.scale if by_norm else member.entity, member.axis, removed))
        return rows
