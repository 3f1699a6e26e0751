"""A pattern of your own: weights with the same label are one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.model.device import wide
from prunella.selection import keep_top, weights_freed
from prunella.types import Mask, Saliency, Scores


@dataclass(frozen=True)
class Regions:
    """Masks of weights that go together by a rule of your own: those with the same label are one unit.

    labels: from the shape of a weight, `(out, in, *kernel)`, to whole numbers of that shape; the numbers themselves
    mean nothing. A unit scores the sum over its weights. Weights of different layers are never one unit.

    Example:

        >>> import torch, prunella as pr
        >>> diagonals = lambda shape: torch.arange(shape[1]) - torch.arange(shape[0])[:, None]
        >>> model, recipe = torch.nn.Linear(4, 4), pr.Recipe(granularity=pr.granularity.Regions(diagonals))
        >>> mask = pr.plan(model, torch.randn(2, 4), recipe, target=pr.Sparsity(0.5)).masks["weight"]
        >>> all(mask.diagonal(k).unique().numel() == 1 for k in range(-3, 4))
        True

    Use: a kernel or a chip with a pattern that no other granularity describes. Avoid: channels, heads and blocks, which
    make the model smaller: take `Channel()` and its like.
    """

    labels: Callable[[tuple[int, ...]], Tensor]

    def on(self, shape: tuple[int, ...]) -> Labelled:
        """The units of a weight. Errors: RequestError for labels of another shape, or that are not whole numbers."""
        labels = self.labels(shape)
        whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
        if not whole or tuple(labels.shape) != tuple(shape):
            found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            why = f"of a weight of shape {tuple(shape)} it gave {found}"
            raise RequestError("labels= has to give a whole number for each weight", why, "one label a weight")
        return Labelled(torch.unique(labels.reshape(shape[0], -1), return_inverse=True)[1].cpu())


@dataclass(frozen=True)
class Labelled:
    """The units of one weight as a matrix `(out, in)`: numbers from 0 up, equal in a unit, on the CPU."""

    units: Tensor

    def ranked(self, scores: Saliency) -> Scores:
        """Scores of the units, ascending."""
        return self._sums(scores).sort().values

    def freed(self, scores: Saliency) -> int | Tensor:
        """Weights removed in total after each step."""
        return weights_freed(self._sums(scores), self._sums(torch.ones_like(scores)))

    def mask(self, scores: Saliency, removed: int) -> Mask:
        """The mask after `removed` units."""
        sums = self._sums(scores)
        mask: Mask = keep_top(sums, len(sums) - removed)[self.units]
        return mask.to(scores.device)

    def _sums(self, scores: Saliency) -> Scores:
        """On the CPU: one number a unit."""
        count = int(self.units.max()) + 1
        return torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(
            0, self.units.flatten(), wide(scores).cpu().flatten()
        )
