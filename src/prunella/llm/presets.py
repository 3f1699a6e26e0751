"""The composition of solver and refinement that loses least in one shot."""

from __future__ import annotations

from collections.abc import Mapping

from prunella.granularity import NM, Element
from prunella.llm.one_shot import OneShot
from prunella.llm.refine import Refine
from prunella.registry.method import solver
from prunella.solvers import admm
from prunella.solvers.layer import Pattern


@solver(source="Boza 2024, arXiv:2401.02938 (solver); Li et al. 2021, arXiv:2102.05426 (blocks after it)")
def one_shot_recipe(
    pattern: Pattern = Element(),  # noqa: B008
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    epochs: int = 3,
    lr: float | None = None,
) -> OneShot:
    """The default way to prune a language model in one shot, for `solve_`: `admm`, then each block is refined.

    Layers are solved in the order in which they run, from what reaches them in the pruned model: `admm`, 15 steps in
    which the mask grows and 5 on the mask that stands, close to least squares. Then all parameters of the block take
    `epochs` passes of Adam over the calibration batches, masks held, the rate falling to 0 along a cosine, toward the
    outputs that the dense block has on the dense stream: `min |B'(x') - B(x)|^2`.
    Data: batches, no labels; 16 thousand tokens are a start.

    pattern, sparsity: as in `OneShot`. epochs, lr: as in `Refine`; epochs=0 leaves the refinement out. lr: None is
    2e-3, and 3e-3 where more than 60 % of the weights go, since the others then have more to make up for. Both were
    better than smaller ones for a model of 135 million parameters; wider layers usually want less. A block whose error
    would not fall keeps what was solved.

    Use: pretrained language models, any pattern, when a few minutes for a hundred million weights can be spent. Avoid:
    a first look: `OneShot(method=sparsegpt)` takes about a third of the time.
    """
    rate = (3e-3 if _gone(pattern, sparsity) > 0.6 else 2e-3) if lr is None else lr
    refine = Refine(epochs, rate) if epochs else None
    return OneShot(pattern, sparsity, admm, refine)


def _gone(pattern: Pattern, sparsity: float | Mapping[str, float]) -> float:
    """The part of the weights that goes; of a mapping the mean."""
    if isinstance(pattern, NM):
        return pattern.sparsity
    return sum(sparsity.values()) / max(len(sparsity), 1) if isinstance(sparsity, Mapping) else sparsity
