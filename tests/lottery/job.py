"""A ticket run that kills its process during a given training; to be called by `tests.stopping.killed`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import nn

import prunella as pr
from prunella.lottery.search import Rewind, Tickets
from tests.lottery.nets import STEPS, batch, fit, loss_of, net

DIES_IN, TRAINED = [-1], [0]
"""The number of the training that is killed, and how many were made: no part of the training, which is resumed."""


def die_in(training: int) -> None:
    """The process is killed in the training of that number, counted from now."""
    DIES_IN[0], TRAINED[0] = training, 0


def train(model: nn.Module, session: pr.lottery.Session) -> None:
    """As `fit`; SIGKILL in the middle of training number `DIES_IN`."""
    if TRAINED == DIES_IN:
        session.end -= 3
        fit(model, session)
        os.kill(os.getpid(), signal.SIGKILL)
    TRAINED[0] += 1
    fit(model, session)


def job(folder: Path | None, rewind: Rewind) -> Tickets[nn.Sequential]:
    """Three rounds with controls."""
    spec = pr.lottery.TrainingSpec(train, STEPS, lambda model: -loss_of(model), seed=3)
    return pr.lottery.find_ticket(
        net(), spec, prune=pr.lottery.imp(batch(), rate=0.3), rounds=3, rewind=rewind, folder=folder
    )
