from .comparison import compare as compare
from .pareto import Study as Study
from .pareto import pareto as pareto

__all__ = [
    "Study",
    "compare",
    "pareto",
]
