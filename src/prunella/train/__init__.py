"""Pruning while training: masks that survive optimizer steps, and gradual schedules."""

from prunella.train.pruner import Pruner as Pruner
