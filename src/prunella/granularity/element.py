"""Single weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prunella.registry.method import granularity
from prunella.selection import keep_top
from prunella.types import Mask, Saliency, Scores


@granularity(source="Han et al. 2015, arXiv:1506.02626; Sun et al. 2023, arXiv:2306.11695 (per_row)", status="stable")
@dataclass(frozen=True)
class Element:
    """Single weights: the finest pattern, with exactly `round(s * N)` zeros at sparsity `s`.

    per_row: compare weights only within their output row. Each step removes one weight from every row of a layer, so
    that all rows of a layer keep the same number. The step size is the number of rows.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 4), pr.Recipe(granularity=pr.Element(per_row=True))
        >>> plan = pr.plan(model, torch.randn(2, 8), recipe, target=pr.Sparsity(0.75))
        >>> plan.masks["weight"].sum(1)
        tensor([2, 2, 2, 2])

    Use: the smallest file at the best accuracy. Avoid: speedups without a sparse kernel.
    """

    per_row: bool = False

    def ranked(self, scores: Saliency) -> Scores:
        """Scores of the steps, ascending: of single weights, or the mean over rows of the r-th smallest."""
        if self.per_row:
            return scores.sort(-1).values.double().mean(0)
        return scores.flatten().sort().values

    def freed(self, scores: Saliency) -> int | Tensor:
        """Weights removed by each step: one number if all steps are equal, else the running total after each step."""
        return scores.shape[0] if self.per_row else 1

    def mask(self, scores: Saliency, removed: int) -> Mask:
        """The mask after `removed` steps."""
        if self.per_row:
            return keep_top(scores, scores.shape[1] - removed)
        return keep_top(scores.flatten(), scores.numel() - removed).view_as(scores)
