from . import recipes as recipes
from .rounds import Rounds as Rounds
from .rounds import force as force
from .rounds import iterate as iterate
from .rounds import iterative_snip as iterative_snip
from .rounds import synflow_rounds as synflow_rounds
from .zeros import plan_zeros as plan_zeros

__all__ = [
    "Rounds",
    "force",
    "iterate",
    "iterative_snip",
    "plan_zeros",
    "recipes",
    "synflow_rounds",
]
