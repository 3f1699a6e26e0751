"""Pruning while training: masks that survive optimizer steps, and gradual schedules."""

from prunella.train.pruner import Pruner as Pruner
from prunella.train.soft import SoftPruner as SoftPruner
from prunella.train.soft import Surgery as Surgery
