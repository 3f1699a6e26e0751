"""Granularities: what a unit is. Frozen dataclasses, of two kinds: masks of weights, and units of structure."""

from prunella.granularity.element import Element as Element
from prunella.granularity.pattern import NM as NM
from prunella.granularity.pattern import Block as Block
from prunella.granularity.structure import Channel as Channel
from prunella.granularity.structure import Depth as Depth
from prunella.granularity.structure import Expert as Expert
from prunella.granularity.structure import Head as Head
from prunella.granularity.structure import Reduce as Reduce
from prunella.granularity.structure import Vocabulary as Vocabulary
from prunella.granularity.structure import Width as Width
from prunella.granularity.structure import reduce_to_units as reduce_to_units

Masking = Element | Block | NM
"""Granularities that give masks: weights become zero, shapes stay."""
Ranked = Channel | Head | Width | Expert | Depth
"""Granularities whose units compete."""
Structural = Ranked | Vocabulary
"""Granularities that give smaller models."""
Granularity = Masking | Structural

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Depth",
    "Element",
    "Expert",
    "Granularity",
    "Head",
    "Masking",
    "Ranked",
    "Reduce",
    "Structural",
    "Vocabulary",
    "Width",
]
