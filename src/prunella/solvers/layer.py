"""One layer as a quadratic: input and result of every layer solver.

With inputs x of the layer and `H = sum x x^T`, new weights `V` change its outputs by
`sum |(V - W) x|^2 = tr((V - W) H (V - W)^T)`. A solver needs only `H` of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.registry.method import solver
from prunella.types import Gram, InputNorm, Mask, Saliency, Weight

Pattern = Element | Block | NM


@dataclass(frozen=True)
class Solved:
    """New weights `(out, in)`, zero where `mask` is False; the relative error and the damping used.

    error: `tr((V - W) H (V - W)^T) / tr(W H W^T)`, of the undamped `H`.
    """

    weight: Tensor
    mask: Mask
    error: float
    damping: float = 0.0


def relative_error(weight: Weight, new_weight: Tensor, gram: Gram) -> float:
    """`tr((V - W) H (V - W)^T) / tr(W H W^T)` in float64: the fraction of the output's energy that is lost."""
    dense, gap = weight.double(), new_weight.double() - weight.double()
    energy = float((dense @ gram.double() * dense).sum())
    lost = float((gap @ gram.double() * gap).sum())
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def project(scores: Saliency, pattern: Pattern, sparsity: float) -> Mask:
    """The mask of `pattern` with the highest scores; exactly `round(s * N)` are removed where the pattern allows it.

    `Element(per_row=True)` removes `round(s * in)` of every row. `NM` has its own sparsity. `Block` removes the fewest
    blocks that reach the sparsity.
    """
    if isinstance(pattern, NM):
        return pattern.mask(scores)
    if isinstance(pattern, Element):
        return pattern.mask(scores, round(sparsity * (scores.shape[1] if pattern.per_row else scores.numel())))
    freed = torch.as_tensor(pattern.freed(scores), device=scores.device)
    return pattern.mask(scores, int(torch.searchsorted(freed, round(sparsity * scores.numel()))) + (sparsity > 0))


def checked(weight: Weight, gram: Gram, pattern: Pattern, sparsity: float) -> None:
    """Errors: RequestError for shapes or a pattern that do not fit, or a sparsity outside [0, 1)."""
    if weight.dim() != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise RequestError(
            f"a weight {tuple(weight.shape)} and a Gram matrix {tuple(gram.shape)} do not fit",
            "(out, in) and (in, in) are needed",
        )
    if not 0 <= sparsity < 1:
        raise RequestError(f"sparsity={sparsity:g} is out of range", "0 <= sparsity < 1", "for example 0.5")
    if isinstance(pattern, NM) and not pattern.fits(tuple(weight.shape)):
        raise RequestError(
            f"NM({pattern.n}, {pattern.m}) does not fit {weight.shape[1]} columns", "M must divide them", "use skip="
        )
    if not bool(torch.isfinite(gram.sum() + weight.sum())):
        raise RequestError(
            "the weight or its Gram matrix is not finite", "it holds inf or nan", "check the model and the data"
        )


@solver(source="Sun et al. 2023, arXiv:2306.11695 (with `wanda`); Han et al. 2015, arXiv:1506.02626 (with magnitude)")
def by_score(
    weight: Weight,
    gram: Gram,
    pattern: Pattern = Element(),  # noqa: B008
    *,
    sparsity: float = 0.5,
    score: Callable[[Weight, InputNorm], Saliency],
) -> Solved:
    """Keep the highest scores of one layer, with unchanged weights: the baseline of the solvers.

    `V = mask * W`, the mask from `score(W, sqrt(diag(H)))`, for example `lambda w, n: prunella.wanda(w, n)`.
    weight `(out, in)`, gram `(in, in)`. Data: none beyond the diagonal of `gram`.
    sparsity: in [0, 1), not used by `NM`. Errors: RequestError for shapes or a pattern that do not fit.

    Example:

        >>> import torch, prunella as pr
        >>> x, weight = torch.randn(64, 8), torch.randn(4, 8)
        >>> solved = pr.solvers.by_score(weight, x.T @ x, sparsity=0.5, score=pr.wanda)
        >>> int(solved.mask.sum())
        16

    Use: memory for a vector of norms but not for an `(in, in)` matrix. Avoid: layers where `admm` or `sparsegpt` can
    run.
    """
    checked(weight, gram, pattern, sparsity)
    mask = project(score(weight, gram.diagonal().clamp_min(0).sqrt().to(weight.dtype)), pattern, sparsity)
    masked = weight * mask
    return Solved(masked, mask, relative_error(weight, masked, gram))
