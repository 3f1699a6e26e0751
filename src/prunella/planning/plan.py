"""A plan: frozen data that say what to keep, where to cut, what was asked and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.graph.cut.changes import Along, Changes, Renumbered, Sizes
from prunella.graph.data import Frozen
from prunella.graph.solve.tokens import known_only, renumber
from prunella.planning import table
from prunella.planning.table import Amount, Row
from prunella.registry import serialize as provenance
from prunella.targets import Sparsity, Target
from prunella.types import Inputs


@dataclass(frozen=True)
class Plan:
    """Frozen data: what to keep, where to cut, what was asked, what it will give.

    keep: group name -> bool over its units.          masks: parameter name -> bool of its shape (True is kept).
    cuts: entity -> axis -> kept positions (int64).   attributes: (owner, name) -> new value of a size attribute.
    weights: parameter name -> new values, for methods that change them. inputs: the example, for verification.
    along: calls (norms, routers) that run along a cut axis, and what stays of it.
    renumbered: inputs and outputs whose numbers (tokens) mean something else in the smaller model.
    remarks: what holds for some parameters: tied, shared, not trained, not used.
    dropped: container -> names of the blocks that go. lists: (owner, name) -> positions that go from a plain list.
    """

    recipe: Mapping[str, Any]
    target: Target
    before: Amount
    after: Amount
    keep: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    cuts: Mapping[str, Mapping[int, Tensor]]
    attributes: Sizes
    rows: tuple[Row, ...]
    frozen: tuple[Frozen, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
    along: tuple[Along, ...] = ()
    renumbered: tuple[Renumbered, ...] = ()
    remarks: tuple[str, ...] = ()
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lists: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    @property
    def changes(self) -> Changes:
        """All that the plan does to the structure of the model."""
        return Changes(self.cuts, self.attributes, self.along, self.renumbered, self.dropped, self.lists)

    @property
    def small_inputs(self) -> Inputs | None:
        """The example as the smaller model takes it: tokens have the numbers that they have there."""
        return renumber(known_only(self.inputs, self.renumbered), self.renumbered)  # type: ignore[no-any-return]

    def renumber(self, tokens: Tensor) -> Tensor:
        """Numbers of tokens in the smaller model. RequestError for a token that is gone."""
        for entry in self.renumbered:
            gone = tokens[~torch.isin(tokens, entry.kept)]
            if gone.numel():
                raise RequestError(f"token {int(gone[0])} is gone", f"{len(entry.kept)} tokens stay", "keep it too")
            return torch.searchsorted(entry.kept, tokens)
        return tokens

    @property
    def got(self) -> float:
        """What the target's unit comes to: a fraction where a fraction was asked, else a number."""
        if isinstance(self.target, Sparsity):
            ranked = [row for row in self.rows if row.kind != "vocabulary"] or self.rows
            total = sum(row.total for row in ranked)
            return 1 - sum(row.kept for row in ranked) / total if total else 0.0
        before, after = getattr(self.before, self.target.name), getattr(self.after, self.target.name)
        return float(after / before if self.target.value <= 1 else after)

    def __str__(self) -> str:
        return table.render(self.rows, self.before, self.after, self._notes(), self.frozen)

    def _notes(self) -> list[str]:
        names = "by hand"
        if self.recipe:
            parts = [self.recipe["criterion"], *self.recipe["granularity"], self.recipe["allocation"]]
            names = ", ".join(map(provenance.title, parts))
        lines = [f"asked {self.target}, got {self.target.name}={self.got:.4g} ({names})"]
        if self.masks:
            lines.append("masks: params and MACs count kept weights only; dense kernels still multiply the zeros")
        if self.recipe.get("align", 1) > 1:
            lines.append(f"channel widths are multiples of {self.recipe['align']}: the last block decides what is got")
        return [*lines, *self.remarks]
