"""Lottery tickets: iterative pruning with rewinding and controls, instability, early-bird tickets and supermasks."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.lottery.connectivity import Barrier as Barrier
from prunella.lottery.connectivity import barrier as barrier
from prunella.lottery.connectivity import instability as instability
from prunella.lottery.early_bird import EarlyBird as EarlyBird
from prunella.lottery.early_bird import mask_distance as mask_distance
from prunella.lottery.imp import imp as imp
from prunella.lottery.search import RateRewind as RateRewind
from prunella.lottery.search import Tickets as Tickets
from prunella.lottery.search import WeightRewind as WeightRewind
from prunella.lottery.search import find_ticket as find_ticket
from prunella.lottery.session import Session as Session
from prunella.lottery.training import TrainingSpec as TrainingSpec
from prunella.lottery.training import descent as descent
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
    "EarlyBird",
    "RateRewind",
    "Session",
    "Tickets",
    "TrainingSpec",
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


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
