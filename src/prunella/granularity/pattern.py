"""Regular patterns of weights for hardware and sparse kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunella.errors import RequestError
from prunella.registry.method import granularity
from prunella.selection import keep_top, weights_freed
from prunella.types import Mask, Saliency, Scores


@granularity(source="Narang et al. 2017, arXiv:1711.02782; Gray et al. 2017")
@dataclass(frozen=True)
class Block:
    """Blocks of `rows x cols` of the matrix `(out, in)`; a block scores the sum over its weights.

    Partial blocks at the edges are padded with scores of zero. Their size is the number of real weights.

    Example:

        >>> import torch, prunella as pr
        >>> model, recipe = torch.nn.Linear(8, 4), pr.Recipe(granularity=pr.Block(4, 2))
        >>> plan = pr.plan(model, torch.randn(2, 8), recipe, target=pr.Sparsity(0.5))
        >>> plan.masks["weight"].sum(0).unique()  # a column of a block is kept or pruned as one
        tensor([0, 4])

    Use: kernels for blocks, such as 16x1 on CPUs. Avoid: small layers, or machines without a kernel for the pattern.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise RequestError(
                f"Block({self.rows}, {self.cols}) has no weights",
                "rows and cols are at least 1",
                "for example Block(16, 1)",
            )

    def ranked(self, scores: Saliency) -> Scores:
        """Scores of the blocks, ascending."""
        return self._sums(scores).sort().values

    def freed(self, scores: Saliency) -> int | Tensor:
        """Weights removed in total after each step."""
        return weights_freed(self._sums(scores), self._sums(torch.ones_like(scores)))

    def mask(self, scores: Saliency, removed: int) -> Mask:
        """The mask after `removed` blocks."""
        sums = self._sums(scores)
        tall = -(-scores.shape[0] // self.rows)
        kept = keep_top(sums, len(sums) - removed).view(tall, -1)
        full = kept.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return full[: scores.shape[0], : scores.shape[1]].contiguous()

    def _sums(self, scores: Saliency) -> Scores:
        out, width = scores.shape
        padded = pad(scores.double(), (0, -width % self.cols, 0, -out % self.rows))
        tiles = padded.reshape(-1, self.rows, padded.shape[1] // self.cols, self.cols)
        return tiles.sum((1, 3)).flatten()


@granularity(source="Zhou et al. 2021, arXiv:2102.04010; Mishra et al. 2021, arXiv:2104.08378", status="stable")
@dataclass(frozen=True)
class NM:
    """N kept of every M consecutive columns of the matrix `(out, in)`. Sparse tensor cores run `NM(2, 4)`.

    The sparsity is always `1 - n / m`, independent of the allocation. Columns of a convolution run over the kernel
    within an input channel. A layer whose number of columns M does not divide is an error: exclude it with skip=, or
    pass ragged=True. With ragged=True the last r columns of a row keep `min(N, r)`, as if the row were padded with
    columns that are removed first, and the sparsity is a little lower.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Linear(8, 4)
        >>> plan = pr.plan(model, torch.randn(2, 8), pr.Recipe(granularity=pr.NM(2, 4)))  # 2:4 needs no target
        >>> plan.masks["weight"].reshape(-1, 4).sum(1)
        tensor([2, 2, 2, 2, 2, 2, 2, 2])

    Use: hardware that runs the pattern. Avoid: other hardware, where it gives no speedup.
    """

    n: int
    m: int
    ragged: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RequestError(
                f"NM({self.n}, {self.m}) is not a pattern",
                "N of every M are kept, with 0 < N < M",
                "for example NM(2, 4)",
            )

    @property
    def title(self) -> str:
        """As a user writes it."""
        return f"NM({self.n}, {self.m})"

    @property
    def sparsity(self) -> float:
        """The fraction removed where M divides the number of columns."""
        return 1 - self.n / self.m

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why a weight of shape `(out, in, *kernel)` cannot have this pattern; empty if it can."""
        fits = self.ragged or torch.Size(shape[1:]).numel() % self.m == 0
        return "" if fits else f"{self.m} does not divide the columns of the weight as a matrix (out, in * kernel)"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can have the pattern."""
        return not self.misfit(shape)

    def mask(self, scores: Saliency) -> Mask:
        """The N highest scores of every M; of equal scores the first."""
        width = scores.shape[1]
        filled = pad(scores, (0, -width % self.m), value=-torch.inf)
        kept = keep_top(filled.reshape(-1, self.m), self.n).view_as(filled)
        return kept[:, :width].contiguous()

    def masks(self, scores: Sequence[Saliency]) -> list[Mask]:
        """The masks of the matrices of all layers."""
        return [self.mask(matrix) for matrix in scores]
