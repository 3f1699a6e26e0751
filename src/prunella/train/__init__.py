"""Training toward zeros: masks that survive steps and gradual schedules, penalties, proximal steps, learned gates."""

from prunella.train.admm import AdmmTraining as AdmmTraining
from prunella.train.concrete import l0_gates_ as l0_gates_
from prunella.train.coupled import Coupled as Coupled
from prunella.train.coupled import coupled as coupled
from prunella.train.gates import advance_ as advance_
from prunella.train.gates import bake_ as bake_
from prunella.train.gates import gate_penalty as gate_penalty
from prunella.train.growing import Growing as Growing
from prunella.train.halfspace import HalfSpace as HalfSpace
from prunella.train.movement import movement_ as movement_
from prunella.train.movement import soft_movement_ as soft_movement_
from prunella.train.penalties import group_lasso as group_lasso
from prunella.train.penalties import group_sparsity as group_sparsity
from prunella.train.penalties import penalised as penalised
from prunella.train.penalties import slimming as slimming
from prunella.train.proximal import Proximal as Proximal
from prunella.train.proximal import group_soft as group_soft
from prunella.train.proximal import soft as soft
from prunella.train.proximal import sparse_group_soft as sparse_group_soft
from prunella.train.pruner import Pruner as Pruner
from prunella.train.thresholds import learned_threshold_ as learned_threshold_
from prunella.train.variational import variational_dropout_ as variational_dropout_
from prunella.train.zeros import plan_zeros as plan_zeros

"""Pruning while training: masks that survive optimizer steps, gradual schedules, and masks that move."""

from prunella.train.dynamic import DropGrow as DropGrow
from prunella.train.rules import Rule as Rule
from prunella.train.rules import granet as granet
from prunella.train.rules import itop as itop
from prunella.train.rules import rigl as rigl
from prunella.train.rules import set_ as set_
from prunella.train.rules import sparse_momentum as sparse_momentum
from prunella.train.top_kast import top_kast_ as top_kast_
