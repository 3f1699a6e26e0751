"""Allocations: how much each group gives. One function each; all are solved by the same search.

An allocation maps every pool's scores to removal keys. The keys of all pools are merged into one order, and the
shortest prefix of it that meets the target is removed: any target, in any unit, is met within one step.
"""

from prunella.allocation.fixed import fixed as fixed
from prunella.allocation.fixed import from_scan as from_scan
from prunella.allocation.layerwise import erk as erk
from prunella.allocation.layerwise import erk_densities as erk_densities
from prunella.allocation.layerwise import uniform as uniform
from prunella.allocation.layerwise import uniform_plus as uniform_plus
from prunella.allocation.outlier import owl as owl
from prunella.allocation.pooled import Normalise as Normalise
from prunella.allocation.pooled import global_ as global_
from prunella.allocation.pooled import isomorphic as isomorphic
from prunella.allocation.pooled import lamp as lamp
from prunella.allocation.rounds import per_round as per_round

__all__ = [
    "Normalise",
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
