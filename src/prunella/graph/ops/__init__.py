"""What each ATen operation says of the axes of its tensors."""

from prunella.graph.ops import lookup, movement, pieces, pointwise, product, reduce
from prunella.graph.ops.registry import RULES, Context, Returned, Rule, apply_rule, rule

__all__ = [
    "RULES", "Context", "Returned", "Rule", "apply_rule", "lookup", "movement", "pieces", "pointwise", "product",
    "reduce", "rule",
]  # fmt: skip
