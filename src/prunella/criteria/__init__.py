"""Criteria: plain functions from statistics to scores. Positional parameters are the statistics, keywords the knobs."""

from prunella.criteria.activation import wanda as wanda
from prunella.criteria.gradient import taylor as taylor
from prunella.criteria.gradient import taylor_sq as taylor_sq
from prunella.criteria.weight import bn_scale as bn_scale
from prunella.criteria.weight import geometric_median as geometric_median
from prunella.criteria.weight import group_norm as group_norm
from prunella.criteria.weight import magnitude as magnitude
from prunella.criteria.weight import random as random

__all__ = ["bn_scale", "geometric_median", "group_norm", "magnitude", "random", "taylor", "taylor_sq", "wanda"]
