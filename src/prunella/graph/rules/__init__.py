"""What each ATen operation says of the axes of its tensors."""

from prunella.graph.rules import (
    lookups as lookup,
)
from prunella.graph.rules import (
    pointwise,
)
from prunella.graph.rules import (
    products as product,
)
from prunella.graph.rules import (
    reductions as reduce,
)
from prunella.graph.rules import (
    slicing as pieces,
)
from prunella.graph.rules import (
    views as movement,
)
from prunella.graph.rules.registry import RULES, Context, Returned, Rule, apply_rule, rule

__all__ = [
    "RULES", "Context", "Returned", "Rule", "apply_rule", "lookup", "movement", "pieces", "pointwise", "product",
    "reduce", "rule",
]  # fmt: skip
