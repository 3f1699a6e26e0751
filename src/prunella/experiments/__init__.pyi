from .comparison import compare as compare
from .pareto_experiment import ParetoExperiment as ParetoExperiment
from .pareto_experiment import pareto as pareto

__all__ = [
    "ParetoExperiment",
    "compare",
    "pareto",
]
