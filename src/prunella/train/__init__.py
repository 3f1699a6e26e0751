"""Training toward zeros: masks that survive steps and gradual schedules, penalties, proximal steps, learned gates."""

from prunella.planning.zeros import plan_zeros as plan_zeros
from prunella.train.dynamic.drop_grow import DropGrow as DropGrow
from prunella.train.dynamic.rules import Rule as Rule
from prunella.train.dynamic.rules import granet as granet
from prunella.train.dynamic.rules import itop as itop
from prunella.train.dynamic.rules import rigl as rigl
from prunella.train.dynamic.rules import rigl_flops as rigl_flops
from prunella.train.dynamic.rules import set_ as set_
from prunella.train.dynamic.rules import sparse_momentum as sparse_momentum
from prunella.train.gates.gate import advance_ as advance_
from prunella.train.gates.gate import bake_ as bake_
from prunella.train.gates.gate import gate_penalty as gate_penalty
from prunella.train.gates.hard_concrete import l0_gates_ as l0_gates_
from prunella.train.gates.movement import soft_movement_ as soft_movement_
from prunella.train.gates.movement import top_movement_ as top_movement_
from prunella.train.gates.target_shape import TargetShape as TargetShape
from prunella.train.gates.thresholds import learned_threshold_ as learned_threshold_
from prunella.train.gates.top_kast import top_kast_ as top_kast_
from prunella.train.gates.variational import variational_dropout_ as variational_dropout_
from prunella.train.network_surgery import Surgery as Surgery
from prunella.train.penalty.admm import AdmmTraining as AdmmTraining
from prunella.train.penalty.greg import Growing as Growing
from prunella.train.penalty.halfspace import HalfSpace as HalfSpace
from prunella.train.penalty.penalties import group_lasso as group_lasso
from prunella.train.penalty.penalties import group_sparsity as group_sparsity
from prunella.train.penalty.penalties import penalized as penalized
from prunella.train.penalty.penalties import slimming as slimming
from prunella.train.penalty.proximal import Proximal as Proximal
from prunella.train.penalty.proximal import group_soft as group_soft
from prunella.train.penalty.proximal import soft as soft
from prunella.train.penalty.proximal import sparse_group_soft as sparse_group_soft
from prunella.train.penalty.units import Coupled as Coupled
from prunella.train.penalty.units import coupled as coupled
from prunella.train.pruner import Pruner as Pruner
from prunella.train.soft_filter import SoftPruner as SoftPruner

__all__ = [
    "AdmmTraining",
    "Coupled",
    "DropGrow",
    "Growing",
    "HalfSpace",
    "Proximal",
    "Pruner",
    "Rule",
    "SoftPruner",
    "Surgery",
    "TargetShape",
    "advance_",
    "bake_",
    "coupled",
    "gate_penalty",
    "granet",
    "group_lasso",
    "group_soft",
    "group_sparsity",
    "itop",
    "l0_gates_",
    "learned_threshold_",
    "penalized",
    "plan_zeros",
    "rigl",
    "rigl_flops",
    "set_",
    "slimming",
    "soft",
    "soft_movement_",
    "sparse_group_soft",
    "sparse_momentum",
    "top_kast_",
    "top_movement_",
    "variational_dropout_",
]


def __dir__() -> list[str]:
    return __all__
