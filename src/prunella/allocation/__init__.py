"""Allocations: the sparsity of each group. Each allocation is one function; one search solves all of them.

An allocation maps the scores of every pool to removal keys. The search merges the keys of all pools into one order and
removes the shortest prefix that meets the target. Any target, in any unit, is met within one step.
"""

from typing import TYPE_CHECKING

from prunella.allocation.fixed import fixed as fixed
from prunella.allocation.fixed import from_scan as from_scan
from prunella.allocation.layerwise import erk as erk
from prunella.allocation.layerwise import erk_densities as erk_densities
from prunella.allocation.layerwise import uniform as uniform
from prunella.allocation.layerwise import uniform_plus as uniform_plus
from prunella.allocation.outlier import owl as owl
from prunella.allocation.pooled import Normalize as Normalize
from prunella.allocation.pooled import global_ as global_
from prunella.allocation.pooled import isomorphic as isomorphic
from prunella.allocation.pooled import lamp as lamp
from prunella.allocation.rounds import per_round as per_round
from prunella.errors import suggesting

__all__ = [
    "Normalize",
    "erk",
    "erk_densities",
    "fixed",
    "from_scan",
    "global_",
    "isomorphic",
    "lamp",
    "owl",
    "per_round",
    "uniform",
    "uniform_plus",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
