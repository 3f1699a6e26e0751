"""Searches for how much each group gives, by what a user's evaluation says of really cut models.

All of them work on a `Space`, made once from model and recipe, and return `Found`, whose `allocation` goes back into a
`Recipe`: the plan then meets its target exactly, is proven, and can be written to a file.
"""

from prunella.search.depth import greedy_blocks as greedy_blocks
from prunella.search.levels import Levels as Levels
from prunella.search.levels import evolve_levels as evolve_levels
from prunella.search.lookup import LatencyTable as LatencyTable
from prunella.search.lookup import latency_table as latency_table
from prunella.search.netadapt import netadapt as netadapt
from prunella.search.objective import agreement as agreement
from prunella.search.objective import amc_reward as amc_reward
from prunella.search.options import Option as Option
from prunella.search.options import cheapest as cheapest
from prunella.search.options import knapsack as knapsack
from prunella.search.scan import Scan as Scan
from prunella.search.scan import scan as scan
from prunella.search.space import Found as Found
from prunella.search.space import Space as Space
from prunella.search.space import space as space
from prunella.search.study import evolve as evolve
from prunella.search.study import evolve_front as evolve_front

__all__ = [
    "Found",
    "LatencyTable",
    "Levels",
    "Option",
    "Scan",
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
    "netadapt",
    "scan",
    "space",
]
