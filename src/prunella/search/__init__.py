"""Searches for the sparsity of each group, by the user's evaluation of pruned models.

All searches work on a `Space`, which is made once from model and recipe, and return a `SearchResult`. Its `allocation`
goes into a `Recipe`: the plan then meets its target exactly, is verified, and can be saved.
"""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.search.evolve import evolve as evolve
from prunella.search.evolve import evolve_front as evolve_front
from prunella.search.evopress import Levels as Levels
from prunella.search.evopress import evolve_levels as evolve_levels
from prunella.search.greedy_depth import greedy_blocks as greedy_blocks
from prunella.search.knapsack import Option as Option
from prunella.search.knapsack import cheapest as cheapest
from prunella.search.knapsack import knapsack as knapsack
from prunella.search.latency_table import LatencyTable as LatencyTable
from prunella.search.latency_table import latency_table as latency_table
from prunella.search.measured import measured as measured
from prunella.search.netadapt import netadapt as netadapt
from prunella.search.objective import agreement as agreement
from prunella.search.objective import amc_reward as amc_reward
from prunella.search.scan import Scan as Scan
from prunella.search.scan import scan as scan
from prunella.search.space import SearchResult as SearchResult
from prunella.search.space import Space as Space
from prunella.search.space import space as space

__all__ = [
    "LatencyTable",
    "Levels",
    "Option",
    "Scan",
    "SearchResult",
    "Space",
    "agreement",
    "amc_reward",
    "cheapest",
    "evolve",
    "evolve_front",
    "evolve_levels",
    "greedy_blocks",
    "knapsack",
    "latency_table",
    "measured",
    "netadapt",
    "scan",
    "space",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
