"""Named ways to prune a language model in one shot: the functions behind `--recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prunella.criteria import ria, wanda
from prunella.granularity import NM, Element
from prunella.llm.recipe import OneShot
from prunella.llm.refine import Refine
from prunella.registry.method import solver
from prunella.solvers import admm, alps, by_score, sparsegpt
from prunella.solvers.layer import Pattern
from prunella.types import InputNorm, Saliency, Weight


@solver(source="Boza 2024, arXiv:2401.02938 (solver); Li et al. 2021, arXiv:2102.05426 (refinement of blocks)")
def one_shot(
    pattern: Pattern = Element(),  # noqa: B008
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    epochs: int = 3,
    lr: float | None = None,
) -> OneShot:
    """The default way to prune a language model in one shot, for `solve_`: `admm`, then each block is refined.

    Layers are solved in their order of execution, for their inputs in the pruned model: `admm` with 15 steps in which
    the mask grows and 5 with the final mask, close to least squares. Then all parameters of the block take `epochs`
    passes of Adam over the calibration batches, with fixed masks and a cosine decay of the learning rate to 0, toward
    the outputs of the dense block for its dense inputs: `min |B'(x') - B(x)|^2`.
    Data: batches, no labels; 16 thousand tokens are a start.

    pattern, sparsity: as in `OneShot`. epochs, lr: as in `Refine`; epochs=0 omits the refinement. lr: None is 2e-3, and
    3e-3 where more than 60 % of the weights are pruned, since the others then have more error to compensate. Both were
    better than smaller rates for a model of 135 million parameters; wider layers usually need less. A block whose error
    would not fall keeps the solved weights.

    Example:

        >>> import prunella as pr
        >>> pr.llm.one_shot(pr.NM(2, 4)).pattern
        NM(n=2, m=4, ragged=False)

    Use: pretrained language models, any pattern, when a few minutes for a hundred million weights can be spent. Avoid:
    a first look: `OneShot(method=sparsegpt)` takes about a third of the time.
    """
    default = 3e-3 if _mean_sparsity(pattern, sparsity) > 0.6 else 2e-3
    refine = Refine(epochs, default if lr is None else lr) if epochs else None
    return OneShot(pattern, sparsity, admm, refine)


def _mean_sparsity(pattern: Pattern, sparsity: float | Mapping[str, float]) -> float:
    """The pruned fraction of the weights; the mean of a mapping."""
    if isinstance(pattern, NM):
        return pattern.sparsity
    return sum(sparsity.values()) / max(len(sparsity), 1) if isinstance(sparsity, Mapping) else sparsity


def _magnitude(weight: Weight, norm: InputNorm) -> Saliency:
    return weight.abs()


def _by_rows(score: Callable[[Weight, InputNorm], Saliency], pattern: Pattern, sparsity: float) -> OneShot:
    """Single weights are compared within their row, and all layers of a block see dense inputs, as in the papers."""
    rows = Element(per_row=True) if isinstance(pattern, Element) else pattern
    return OneShot(rows, sparsity, partial(by_score, score=score), true_sequential=False)


PRESETS: Mapping[str, Callable[..., OneShot]] = {
    "one_shot": one_shot,
    "admm": partial(OneShot, method=admm),
    "alps": partial(OneShot, method=alps),
    "sparsegpt": partial(OneShot, method=sparsegpt),
    "wanda": partial(_by_rows, wanda),
    "ria": partial(_by_rows, ria),
    "magnitude": lambda pattern, sparsity: OneShot(pattern, sparsity, partial(by_score, score=_magnitude)),
}
"""Name -> function of (pattern, sparsity). Magnitudes are compared over the whole matrix."""
