"""Rules: the relations between the axes of the tensors of each ATen operation."""

from prunella.graph.rules import (
    attention,
    lookups,
    pointwise,
    products,
    recurrent,
    reductions,
    scattered,
    slicing,
    views,
)
from prunella.graph.rules.registry import RULES, Context, Returned, Rule, apply_rule, call_rule, rule
from prunella.graph.work import FORMULAS, FREE, UNKNOWN

__all__ = [
    "RULES", "Context", "Returned", "Rule", "apply_rule", "attention", "call_rule", "lookups", "pointwise", "products",
    "recurrent", "reductions", "rule", "scattered", "slicing", "views",
]  # fmt: skip

FREE.update(name for name in RULES if "." not in name and name not in FORMULAS and name not in UNKNOWN)  # of ATen
