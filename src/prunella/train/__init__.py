"""Pruning while training: masks that survive optimizer steps, gradual schedules, and masks that move."""

from prunella.train.dynamic import DropGrow as DropGrow
from prunella.train.pruner import Pruner as Pruner
from prunella.train.rules import Rule as Rule
from prunella.train.rules import granet as granet
from prunella.train.rules import itop as itop
from prunella.train.rules import rigl as rigl
from prunella.train.rules import set_ as set_
from prunella.train.rules import sparse_momentum as sparse_momentum
from prunella.train.top_kast import top_kast_ as top_kast_
