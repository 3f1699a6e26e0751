"""Metrics of pruned models: size, speed, effective sparsity, language modeling and side effects."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.measure.count import count as count
from prunella.measure.throughput import Throughput as Throughput
from prunella.measure.throughput import throughput as throughput
from prunella.measure.timing import Timing as Timing
from prunella.measure.timing import compare_latency as compare_latency
from prunella.metrics.effective_sparsity import EffectiveSparsity as EffectiveSparsity
from prunella.metrics.effective_sparsity import effective_sparsity as effective_sparsity
from prunella.metrics.language import Perplexity as Perplexity
from prunella.metrics.language import TokenAgreement as TokenAgreement
from prunella.metrics.language import perplexity as perplexity
from prunella.metrics.language import token_agreement as token_agreement
from prunella.metrics.language import zero_shot as zero_shot
from prunella.metrics.outputs import calibration_error as calibration_error
from prunella.metrics.outputs import flip_rate as flip_rate
from prunella.metrics.outputs import kl_divergence as kl_divergence
from prunella.metrics.outputs import per_class_drop as per_class_drop
from prunella.metrics.outputs import pruning_identified_exemplars as pruning_identified_exemplars
from prunella.metrics.side_effects import SideEffects as SideEffects
from prunella.metrics.side_effects import side_effects as side_effects
from prunella.metrics.size import Compression as Compression
from prunella.metrics.size import compression_ratio as compression_ratio
from prunella.metrics.speedup import Speedup as Speedup
from prunella.metrics.speedup import effective_macs as effective_macs
from prunella.metrics.speedup import energy as energy
from prunella.metrics.speedup import speedup as speedup

__all__ = [
    "Compression",
    "EffectiveSparsity",
    "Perplexity",
    "SideEffects",
    "Speedup",
    "Throughput",
    "Timing",
    "TokenAgreement",
    "calibration_error",
    "compare_latency",
    "compression_ratio",
    "count",
    "effective_macs",
    "effective_sparsity",
    "energy",
    "flip_rate",
    "kl_divergence",
    "per_class_drop",
    "perplexity",
    "pruning_identified_exemplars",
    "side_effects",
    "speedup",
    "throughput",
    "token_agreement",
    "zero_shot",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
