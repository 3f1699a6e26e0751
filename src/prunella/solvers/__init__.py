"""Solvers: methods that find mask and weights together, or new weights for a mask.

Layer solvers take one layer as a quadratic, `(weight, gram, pattern)`, without a model: `sparsegpt`, `admm`, `alps`,
`swap`, `prune_and_quantize`, `refit`.
Plan solvers take a plan and return it with new weights, from the curvature of the loss: `obs`, `woodfisher`, `mfac`.
"""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.solvers.admm import admm as admm
from prunella.solvers.alps import alps as alps
from prunella.solvers.curvature import mfac as mfac
from prunella.solvers.curvature import obs as obs
from prunella.solvers.curvature import woodfisher as woodfisher
from prunella.solvers.layer import Solved as Solved
from prunella.solvers.layer import by_score as by_score
from prunella.solvers.quantized import Grid as Grid
from prunella.solvers.quantized import OnGrid as OnGrid
from prunella.solvers.quantized import prune_and_quantize as prune_and_quantize
from prunella.solvers.refit import refit as refit
from prunella.solvers.sparsegpt import sparsegpt as sparsegpt
from prunella.solvers.swap import swap as swap

__all__ = [
    "Grid",
    "OnGrid",
    "Solved",
    "admm",
    "alps",
    "by_score",
    "mfac",
    "obs",
    "prune_and_quantize",
    "refit",
    "sparsegpt",
    "swap",
    "woodfisher",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
