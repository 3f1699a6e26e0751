"""Statistics for criteria. One pass over the data collects only the statistics that are needed.

`STATISTICS` describes every statistic and names the slot that collects it.
"""

from prunella.model.state import untouched as untouched
from prunella.stats.collect import Source as Source
from prunella.stats.collect import Statistics as Statistics
from prunella.stats.collect import collect as collect
from prunella.stats.subject import Subject as Subject
from prunella.stats.table import STATISTICS as STATISTICS
from prunella.stats.table import Statistic as Statistic

__all__ = ["STATISTICS", "Source", "Statistic", "Statistics", "Subject", "collect", "untouched"]
