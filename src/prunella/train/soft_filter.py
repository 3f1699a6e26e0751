"""Soft filter pruning: filters are set to zero after every epoch and keep learning until the end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import training
from prunella.targets import Sparsity
from prunella.train.pruner import Planner, planner_of
from prunella.transform.apply import apply_, plan_masks
from prunella.types import Inputs


@training(source="He et al. 2018, arXiv:1808.06866 (soft filter pruning)")
class SoftPruner:
    """Set what the newest plan removes to zero after every epoch, and let it learn on; the end decides.

        soft = SoftPruner(model, batch, recipe=Recipe(), target=Sparsity(0.3))
        for epoch in range(epochs):
            train(model); soft.step()
        small = shrink(model, soft.finish())

    Channels: only the rows that produce a unit are zeroed, `W_j = 0`; bias, normalisation and readers stay, since a
    unit with nothing on either side would get no gradient and could never come back. Masks of weights: the weights are
    zeroed and no mask is kept. At the end `finish` plans once more, and zeroes everything that the plan removes, for
    good; `shrink` is then exact. A unit whose bias or shift is not positive gets no gradient behind a ReLU, and stays.
    recipe: a `Recipe`, or a function from target to plan where planning needs data.

    Use: training from scratch, or long fine-tuning, to channels that go. Avoid: short recoveries: a unit that was
    zeroed needs epochs to come back.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, recipe: Recipe | Planner, target: Sparsity) -> None:
        self.model, self.target = model, target
        self._inputs = inputs
        self._graph: Graph | None = None
        self._planner = planner_of(model, recipe, inputs)

    def step(self) -> Plan:
        """After an epoch: plan, and zero what goes. The masks that the model carries are not touched."""
        made = self._plan()
        root = unwrap(self.model)
        named = dict(root.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for parameter, mask in plan_masks(root, replace(made, changes=replace(made.changes, cuts={}))).items():
                parameter.masked_fill_(~mask, 0)
            for entity, axis, gone in self._rows(made):
                named[entity].index_fill_(axis, gone.to(named[entity].device), 0)
        return made

    def finish(self) -> Plan:
        """After the last epoch: plan, zero what goes with everything coupled to it, keep the masks; the plan."""
        made = self._plan()
        apply_(self.model, made, regrow=True)
        return made

    def _plan(self) -> Plan:
        assert self._planner is not None
        return self._planner(self.target)

    def _rows(self, made: Plan) -> list[tuple[str, int, Tensor]]:
        """Entity, axis and positions of the rows that produce what the plan removes."""
        if not made.keep:
            return []
        if self._graph is None:
            self._graph = couple(unwrap(self.model), self._inputs)
        rows = []
        for name, kept in made.keep.items():
            for member in self._graph.group(name).members:
                gone = torch.from_numpy(member.index)[~kept[torch.from_numpy(member.unit)]]
                if member.role == "out" and len(gone):
                    rows.append((member.entity, member.axis, gone))
        return rows
