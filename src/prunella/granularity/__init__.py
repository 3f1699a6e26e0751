"""Granularities: the units of pruning. Some are masks of weights, others units that are cut out of the model."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.granularity.element import Element as Element
from prunella.granularity.kernel import Filter as Filter
from prunella.granularity.kernel import Kernel as Kernel
from prunella.granularity.kernel import KernelPattern as KernelPattern
from prunella.granularity.kernel import Vector as Vector
from prunella.granularity.pattern import NM as NM
from prunella.granularity.pattern import Block as Block
from prunella.granularity.regions import Regions as Regions
from prunella.granularity.structure import Channel as Channel
from prunella.granularity.structure import Depth as Depth
from prunella.granularity.structure import Expert as Expert
from prunella.granularity.structure import Head as Head
from prunella.granularity.structure import Reduce as Reduce
from prunella.granularity.structure import Vocabulary as Vocabulary
from prunella.granularity.structure import Width as Width
from prunella.granularity.structure import reduce_to_units as reduce_to_units

Fixed = NM | KernelPattern
"""Granularities of masks with a fixed sparsity, independent of the allocation."""
Shaped = Vector | Kernel | Filter | Regions
"""Granularities of masks whose blocks depend on the shape of the weight."""
Competing = Element | Block | Shaped
"""Granularities of masks whose units compete."""
Masking = Competing | Fixed
"""Granularities that give masks: weights become zero, shapes do not change."""
Ranked = Channel | Head | Width | Expert | Depth
"""Granularities whose units compete."""
Structural = Ranked | Vocabulary
"""Granularities that give smaller models."""
Granularity = Masking | Structural

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Competing",
    "Depth",
    "Element",
    "Expert",
    "Filter",
    "Fixed",
    "Granularity",
    "Head",
    "Kernel",
    "KernelPattern",
    "Masking",
    "Ranked",
    "Reduce",
    "Regions",
    "Shaped",
    "Structural",
    "Vector",
    "Vocabulary",
    "Width",
    "reduce_to_units",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
