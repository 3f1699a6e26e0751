"""Sparse training: masks that persist, gradual schedules, penalties, proximal steps, learned gates."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.planning.zeros import plan_zeros as plan_zeros
from prunella.train.dynamic.drop_grow import DropGrow as DropGrow
from prunella.train.dynamic.rules import Rule as Rule
from prunella.train.dynamic.rules import granet as granet
from prunella.train.dynamic.rules import itop as itop
from prunella.train.dynamic.rules import rigl as rigl
from prunella.train.dynamic.rules import rigl_flops as rigl_flops
from prunella.train.dynamic.rules import set_ as set_
from prunella.train.dynamic.rules import sparse_momentum as sparse_momentum
from prunella.train.gates.gate import gate_penalty as gate_penalty
from prunella.train.gates.gate import merge_gates_ as merge_gates_
from prunella.train.gates.gate import step_gates_ as step_gates_
from prunella.train.gates.hard_concrete import l0_gates_ as l0_gates_
from prunella.train.gates.movement import soft_movement_ as soft_movement_
from prunella.train.gates.movement import top_movement_ as top_movement_
from prunella.train.gates.target_shape import TargetShape as TargetShape
from prunella.train.gates.thresholds import learned_threshold_ as learned_threshold_
from prunella.train.gates.top_kast import top_kast_ as top_kast_
from prunella.train.gates.variational import variational_dropout_ as variational_dropout_
from prunella.train.network_surgery import NetworkSurgery as NetworkSurgery
from prunella.train.penalty.admm import AdmmTraining as AdmmTraining
from prunella.train.penalty.greg import GReg as GReg
from prunella.train.penalty.halfspace import HalfSpace as HalfSpace
from prunella.train.penalty.penalties import group_lasso as group_lasso
from prunella.train.penalty.penalties import group_sparsity as group_sparsity
from prunella.train.penalty.penalties import penalized as penalized
from prunella.train.penalty.penalties import slimming as slimming
from prunella.train.penalty.proximal import Proximal as Proximal
from prunella.train.penalty.proximal import group_soft_threshold as group_soft_threshold
from prunella.train.penalty.proximal import soft_threshold as soft_threshold
from prunella.train.penalty.proximal import sparse_group_soft_threshold as sparse_group_soft_threshold
from prunella.train.penalty.units import CoupledUnits as CoupledUnits
from prunella.train.penalty.units import coupled_units as coupled_units
from prunella.train.pruner import Pruner as Pruner
from prunella.train.soft_filter import SoftFilterPruner as SoftFilterPruner

__all__ = [
    "AdmmTraining",
    "CoupledUnits",
    "DropGrow",
    "GReg",
    "HalfSpace",
    "NetworkSurgery",
    "Proximal",
    "Pruner",
    "Rule",
    "SoftFilterPruner",
    "TargetShape",
    "coupled_units",
    "gate_penalty",
    "granet",
    "group_lasso",
    "group_soft_threshold",
    "group_sparsity",
    "itop",
    "l0_gates_",
    "learned_threshold_",
    "merge_gates_",
    "penalized",
    "plan_zeros",
    "rigl",
    "rigl_flops",
    "set_",
    "slimming",
    "soft_movement_",
    "soft_threshold",
    "sparse_group_soft_threshold",
    "sparse_momentum",
    "step_gates_",
    "top_kast_",
    "top_movement_",
    "variational_dropout_",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
