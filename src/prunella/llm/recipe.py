"""The recipe of one-shot pruning of a language model: pattern, sparsity, layer solver, refinement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prunella.errors import RequestError
from prunella.granularity import NM, Element
from prunella.graph.data import Layer
from prunella.llm.refine import Refine
from prunella.solvers.admm import admm
from prunella.solvers.layer import Pattern, Solved

LayerSolver = Callable[..., Solved]
"""`(weight, gram, pattern, sparsity=)` -> `Solved`: `admm`, `sparsegpt`, `partial(by_score, score=wanda)`."""


@dataclass(frozen=True)
class OneShot:
    """How to prune in one shot.

    pattern: `Element()`, `Element(per_row=True)`, `NM(2, 4)` or `Block(r, c)`. sparsity: of every layer in [0, 1), or a
    mapping from layer names, which keeps all other layers dense; `NM` fixes its own. method: a layer solver, with its
    knobs bound by `functools.partial`. refine: gradient steps for each block after its layers are solved, or None.
    true_sequential: a layer is solved for inputs computed by the pruned layers before it in the same block; if False,
    as in the reference code of Wanda and SparseGPT, only the blocks before it are pruned.
    """

    pattern: Pattern = field(default_factory=Element)
    sparsity: float | Mapping[str, float] = 0.5
    method: LayerSolver = admm
    refine: Refine | None = None
    true_sequential: bool = True

    def __post_init__(self) -> None:
        for value in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]:
            if not 0 <= value < 1:
                raise RequestError(f"sparsity={value:g} is out of range", "0 <= sparsity < 1", "for example 0.5")

    def sparsity_of(self, layer: Layer) -> float | None:
        """The sparsity of a layer, None if it is kept dense."""
        if isinstance(self.pattern, NM):
            return self.pattern.sparsity
        return self.sparsity.get(layer.name) if isinstance(self.sparsity, Mapping) else self.sparsity

    def prunes(self, layer: Layer, *, router: bool) -> bool:
        """Whether the layer is pruned; a router of experts only if a mapping of sparsities names it."""
        named = isinstance(self.sparsity, Mapping) and layer.name in self.sparsity
        return self.sparsity_of(layer) is not None and (named or not router)
