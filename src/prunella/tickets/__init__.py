"""Lottery tickets: iterative pruning with rewinding and controls, instability, early-bird tickets and supermasks."""

from prunella.tickets.connect import Barrier as Barrier
from prunella.tickets.connect import barrier as barrier
from prunella.tickets.connect import instability as instability
from prunella.tickets.course import Course as Course
from prunella.tickets.course import descent as descent
from prunella.tickets.early_bird import EarlyBird as EarlyBird
from prunella.tickets.early_bird import mask_distance as mask_distance
from prunella.tickets.find import RateRewind as RateRewind
from prunella.tickets.find import Tickets as Tickets
from prunella.tickets.find import WeightRewind as WeightRewind
from prunella.tickets.find import find_ticket as find_ticket
from prunella.tickets.imp import imp as imp
from prunella.tickets.lap import Lap as Lap
from prunella.train.gates.supermask import finalize_supermask as finalize_supermask
from prunella.train.gates.supermask import supermask_ as supermask_
from prunella.transform.controls import Control as Control
from prunella.transform.controls import Controls as Controls
from prunella.transform.controls import reinit_ as reinit_
from prunella.transform.controls import shuffle_masks_ as shuffle_masks_

__all__ = [
    "Barrier",
    "Control",
    "Controls",
    "Course",
    "EarlyBird",
    "Lap",
    "RateRewind",
    "Tickets",
    "WeightRewind",
    "barrier",
    "descent",
    "finalize_supermask",
    "find_ticket",
    "imp",
    "instability",
    "mask_distance",
    "reinit_",
    "shuffle_masks_",
    "supermask_",
]
