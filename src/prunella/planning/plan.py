"""A plan: frozen data on the kept units, the cuts, the request and the resulting sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.graph.cut.changes import Changes, Cuts, Dropped, Renumbered, Sizes, changes
from prunella.graph.data import Frozen, Graph, Group
from prunella.graph.solve.tokens import known_only, renumber
from prunella.measure.formats import html_table
from prunella.measure.text import short_count
from prunella.planning import accounting, coverage
from prunella.planning.accounting import Amount, Pattern, Row
from prunella.planning.render import emptied, remarks_of, render, size_remarks
from prunella.registry import serialize
from prunella.targets import Sparsity, Target, Threshold
from prunella.types import Examples, Inputs, Keep, Mask


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Frozen data: the kept units, the cuts, the request, and the resulting sizes.

    before, after: size and cost of the model.          recipe: the recipe as plain data; empty for plans by hand.
    target: the target; None without one.               keep: group name -> bool over its units, True is kept.
    masks: parameter name -> bool of its shape, True is kept.
    changes: all structural changes of the model: cut axes, sizes, calls, tokens, blocks.
    weights: parameter name -> new values, for methods that change them. inputs: the example, for verification.
    others: further examples for which the plan was made and verified.
    rows: the kept part of each group or weight.        frozen: what cannot be pruned, and why.
    remarks: properties of some parameters: tied, shared, not trained, not used.
    caveats: what the numbers do not cover; printed first.

    `plan` makes plans; `Plan.of_structure` and `Plan.of_masks` make plans from your own choice of units or weights.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 4), pr.Recipe(granularity=pr.NM(2, 4))
        >>> plan: pr.Plan = pr.plan(model, torch.randn(2, 8), recipe)
        >>> plan.before.params, plan.after.params  # 32 weights and 4 biases before
        (36.0, 20.0)
    """

    before: Amount
    after: Amount
    recipe: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    keep: Keep = field(default_factory=dict)
    masks: Mapping[str, Mask] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
    others: tuple[Inputs, ...] = ()
    rows: tuple[Row, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    remarks: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    @classmethod
    def of_structure(
        cls,
        graph: Graph,
        keep: Keep,
        *,
        inputs: Inputs | Examples | None = None,
        frozen: Sequence[Frozen] | None = None,
        recipe: Mapping[str, Any] | None = None,
        target: Target | None = None,
    ) -> Plan:
        """The plan that keeps `keep`, group name -> bool over its units, with all consequences for coupled axes.

        inputs: the example (or `Examples`), for verification. frozen: what cannot be pruned; default: as in the graph.
        recipe, target: recorded in the plan.
        """
        groups = [group for group in (*graph.groups, *graph.stacks) if group.name in keep]
        first, others = Examples.split(inputs) if inputs is not None else (None, ())
        return cls(
            recipe=recipe or {},
            target=target,
            before=accounting.amount(graph, {}),
            after=accounting.amount(graph, keep),
            keep=keep,
            changes=changes(graph, keep),
            inputs=first,
            others=others,
            rows=accounting.group_rows(graph, groups, keep),
            frozen=tuple(graph.frozen if frozen is None else frozen),
            remarks=(*remarks_of(graph), *size_remarks(graph, keep)),
            caveats=coverage.lines(
                coverage.uncounted_work(graph),
                coverage.unregistered_work(graph),
                coverage.uncovered_weights(graph, _cut_by(groups)) if isinstance(target, Sparsity) else "",
            ),
        )

    @classmethod
    def of_masks(
        cls,
        graph: Graph,
        masks: Mapping[str, Mask],
        *,
        pattern: Pattern = "element",
        inputs: Inputs | None = None,
        frozen: Sequence[Frozen] | None = None,
        recipe: Mapping[str, Any] | None = None,
        target: Target | None = None,
    ) -> Plan:
        """The plan that zeroes weights by `masks`, parameter name -> bool of its shape, True is kept.

        pattern: the name of the pattern, or a function of (mask, layer) that names it. Other arguments: as in
        `of_structure`.
        """
        rows = accounting.mask_rows(graph, masks, pattern)
        return cls(
            recipe=recipe or {},
            target=target,
            before=accounting.amount(graph, {}),
            after=accounting.masked_amount(graph, rows, masks),
            masks=masks,
            inputs=inputs,
            rows=rows,
            frozen=tuple(graph.frozen if frozen is None else frozen),
            remarks=(*remarks_of(graph), *emptied(rows)),
            caveats=coverage.lines(
                coverage.uncounted_work(graph),
                coverage.unregistered_work(graph),
                coverage.uncovered_weights(graph, masks),
            ),
        )

    @property
    def cuts(self) -> Cuts:
        """Entity -> axis -> kept positions (int64)."""
        return self.changes.cuts

    @property
    def attributes(self) -> Sizes:
        """(owner, name) -> new value of a size attribute."""
        return self.changes.attributes

    @property
    def dropped(self) -> Dropped:
        """Container -> names of the removed blocks."""
        return self.changes.dropped

    @property
    def renumbered(self) -> tuple[Renumbered, ...]:
        """Inputs and outputs with other token ids in the smaller model."""
        return self.changes.renumbered

    @property
    def small_inputs(self) -> Inputs | None:
        """The example for the smaller model, with its token ids."""
        return renumber(known_only(self.inputs, self.renumbered), self.renumbered)  # type: ignore[no-any-return]

    def renumber(self, tokens: Tensor) -> Tensor:
        """Token ids in the smaller model. Errors: RequestError for a pruned token."""
        for entry in self.renumbered:
            pruned = tokens[~torch.isin(tokens, entry.kept)]
            if pruned.numel():
                raise RequestError(
                    f"token {int(pruned[0])} is pruned", f"{len(entry.kept)} tokens are kept", "keep it too"
                )
            return torch.searchsorted(entry.kept, tokens)
        return tokens

    @property
    def got(self) -> float:
        """The reached amount in the unit of the target: a fraction if the target is a fraction, otherwise a number.

        Without a target, and for a threshold: the sparsity, the fraction of the units (weights) that is removed.
        """
        if isinstance(self.target, Sparsity) and self.target.of == "model":
            return 1 - self.after.model_weights / self.before.model_weights
        if self.target is None or isinstance(self.target, Sparsity | Threshold):
            return accounting.sparsity(self.rows)
        before, after = getattr(self.before, self.target.name), getattr(self.after, self.target.name)
        return float(after / before if self.target.value <= 1 else after)

    def __str__(self) -> str:
        text = render(self.rows, self.before, self.after, self._notes(), self.frozen)
        return "\n".join([*self.caveats, *([""] if self.caveats else []), text])

    def _repr_html_(self) -> str:
        """The plan in a notebook."""
        rows = [(row.name, row.kind, f"{row.kept}/{row.total}") for row in self.rows]
        before, after = self.before, self.after
        sizes = f"params {short_count(before.params)} -> {short_count(after.params)}"
        sizes += f", MACs {short_count(before.macs)} -> {short_count(after.macs)}"
        return html_table(
            f"Plan: {self.outcome}", ("name", "kind", "kept"), rows, (*self.caveats, sizes, *self.remarks)
        )

    def _notes(self) -> list[str]:
        names = "by hand"
        chosen = self.target is None and "by_hand" in self.recipe
        if {"criterion", "granularity", "allocation"} <= self.recipe.keys() and not chosen:
            parts = [self.recipe["criterion"], *self.recipe["granularity"], self.recipe["allocation"]]
            names = ", ".join(map(serialize.title, parts))
        lines = [f"{self.outcome} ({names})"]
        if self.masks:
            lines.append("masks: params and MACs count kept weights only; dense kernels still multiply the zeros")
        if self.recipe.get("round_to", 1) > 1:
            lines.append(f"channel widths are multiples of {self.recipe['round_to']}: the target is met to one step")
        return [*lines, *self.remarks]

    @property
    def outcome(self) -> str:
        """`asked macs=0.5, got macs=0.4998`; only the sparsity without a target."""
        if self.target is None:
            return f"sparsity={self.got:.4g}, without a target"
        unit = "sparsity" if isinstance(self.target, Threshold) else self.target.name
        return f"asked {self.target}, got {unit}={self.got:.4g}"


def _cut_by(groups: Sequence[Group]) -> set[str]:
    """The parameters that are cut with a unit of these groups."""
    return {member.entity for group in groups for member in group.members}
