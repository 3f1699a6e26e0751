"""Comparison of latencies, re-exported from `prunella.measure.timing`."""

from prunella.measure.timing import Comparison as Comparison
from prunella.measure.timing import LatencySamples as LatencySamples
from prunella.measure.timing import Ratio as Ratio
from prunella.measure.timing import compare_latency as compare_latency
from prunella.measure.timing import paired_ratio as paired_ratio

__all__ = ["Comparison", "LatencySamples", "Ratio", "compare_latency", "paired_ratio"]
