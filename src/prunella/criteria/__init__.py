"""Criteria: functions from statistics to scores. Positional parameters are statistics, keyword-only ones are knobs."""

from typing import TYPE_CHECKING

from prunella.criteria.activation import activation_norm as activation_norm
from prunella.criteria.activation import activation_variance as activation_variance
from prunella.criteria.activation import apoz as apoz
from prunella.criteria.activation import block_influence as block_influence
from prunella.criteria.activation import fluctuation as fluctuation
from prunella.criteria.activation import hrank as hrank
from prunella.criteria.activation import obs_units as obs_units
from prunella.criteria.activation import reap as reap
from prunella.criteria.activation import ria as ria
from prunella.criteria.activation import router_frequency as router_frequency
from prunella.criteria.activation import router_weight as router_weight
from prunella.criteria.activation import wanda as wanda
from prunella.criteria.control import inverted as inverted
from prunella.criteria.control import shuffled as shuffled
from prunella.criteria.curvature import fisher as fisher
from prunella.criteria.curvature import mfac_saliency as mfac_saliency
from prunella.criteria.curvature import obd as obd
from prunella.criteria.curvature import obert as obert
from prunella.criteria.curvature import obs_saliency as obs_saliency
from prunella.criteria.gradient import head_importance as head_importance
from prunella.criteria.gradient import movement as movement
from prunella.criteria.gradient import taylor as taylor
from prunella.criteria.gradient import taylor_abs as taylor_abs
from prunella.criteria.gradient import taylor_sq as taylor_sq
from prunella.criteria.initial import grasp as grasp
from prunella.criteria.initial import snip as snip
from prunella.criteria.initial import synflow as synflow
from prunella.criteria.weight import bn_scale as bn_scale
from prunella.criteria.weight import geometric_median as geometric_median
from prunella.criteria.weight import group_norm as group_norm
from prunella.criteria.weight import magnitude as magnitude
from prunella.criteria.weight import random as random
from prunella.errors import suggesting
from prunella.stats.table import Statistic as Statistic
from prunella.stats.table import register_statistic as register_statistic

__all__ = [
    "Statistic",
    "activation_norm",
    "activation_variance",
    "apoz",
    "block_influence",
    "bn_scale",
    "fisher",
    "fluctuation",
    "geometric_median",
    "grasp",
    "group_norm",
    "head_importance",
    "hrank",
    "inverted",
    "magnitude",
    "mfac_saliency",
    "movement",
    "obd",
    "obert",
    "obs_saliency",
    "obs_units",
    "random",
    "reap",
    "register_statistic",
    "ria",
    "router_frequency",
    "router_weight",
    "shuffled",
    "snip",
    "synflow",
    "taylor",
    "taylor_abs",
    "taylor_sq",
    "wanda",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
