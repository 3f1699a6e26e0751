"""Statistics for criteria, from one pass over the data, collecting only what is asked for.

A statistic that needs data has a slot in `SLOTS`; the others (`weight`, `unit_weight`, `norm_scale`, `noise`) are read
off the parameters by `prunella.planning.scoring`.
"""

from prunella.model.state import untouched as untouched
from prunella.stats.collect import SLOTS as SLOTS
from prunella.stats.collect import Source as Source
from prunella.stats.collect import Statistics as Statistics
from prunella.stats.collect import collect as collect
from prunella.stats.subject import Subject as Subject

__all__ = ["SLOTS", "Source", "Statistics", "Subject", "collect", "untouched"]
