"""Is it faster? The clock itself is `prunella.timing`, which plans for a `Latency` use too."""

from prunella.timing import Comparison as Comparison
from prunella.timing import Latency as Latency
from prunella.timing import Ratio as Ratio
from prunella.timing import compare_latency as compare_latency
from prunella.timing import paired_ratio as paired_ratio

__all__ = ["Comparison", "Latency", "Ratio", "compare_latency", "paired_ratio"]
