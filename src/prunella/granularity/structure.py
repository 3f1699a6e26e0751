"""Units of structured pruning: their removal makes the model smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.graph.data import Kind
from prunella.registry.method import granularity
from prunella.types import Scores


class Reduce(Enum):
    """Reduction of the saliencies of the weights of a unit to its score."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"


@granularity(source="Li et al. 2017, arXiv:1608.08710; He et al. 2017, arXiv:1707.06168", status="stable")
@dataclass(frozen=True)
class Channel:
    """Channels, filters and neurons, with everything coupled to them.

    reduce: reduction of the saliencies of the weights in the criterion's scope to one score: sum (the papers' norms),
    mean or maximum. Scores of criteria for units are not reduced.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3))
        >>> recipe = pr.Recipe(pr.criteria.group_norm, pr.Channel())
        >>> plan = pr.plan(model, torch.randn(1, 3, 8, 8), recipe, target=pr.Sparsity(0.5))
        >>> [tuple(parameter.shape) for parameter in pr.shrink(model, plan).parameters()][:4]
        [(4, 3, 3, 3), (4,), (4,), (4,)]

    Use: a smaller and faster dense model on any machine. Avoid: no loss of accuracy allowed and a sparse kernel
    available.
    """

    reduce: Reduce = Reduce.SUM
    kind: ClassVar[Kind] = "channel"


@granularity(source="Michel et al. 2019, arXiv:1905.10650; Voita et al. 2019, arXiv:1905.09418")
@dataclass(frozen=True)
class Head:
    """Attention heads: query, key, value and output slices together; with grouped queries, a key-value group.

    head_dim and the scale of the attention scores do not change. reduce: as for `Channel`.

    Example:

        >>> import torch, prunella as pr
        >>> class Attention(torch.nn.Linear):
        ...     def forward(self, x):
        ...         q, k, v = super().forward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        ...         return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        >>> model = torch.nn.Sequential(Attention(16, 48), torch.nn.Linear(16, 16))
        >>> model[0].heads = 4
        >>> plan = pr.plan(model, torch.randn(2, 5, 16), pr.Recipe(granularity=pr.Head()), target=pr.Sparsity(0.5))
        >>> pr.shrink(model, plan)[0].heads
        2

    Use: transformers, together with `Channel()`. Avoid: models with few key-value heads, where a unit is a large group.
    """

    reduce: Reduce = Reduce.SUM
    kind: ClassVar[Kind] = "head"


@granularity(source="Muralidharan et al. 2024, arXiv:2407.14679; Ashkboos et al. 2024, arXiv:2401.15024")
@dataclass(frozen=True)
class Width:
    """Positions of a residual stream or of an embedding, in every layer that writes or reads them.

    Norms along these positions take their statistics over the kept ones (a layer norm of fewer features). The check
    compares with the masked model in this form. reduce: as for `Channel`.

    Example:

        >>> import torch, prunella as pr
        >>> class Residual(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x).relu()
        >>> norm = torch.nn.LayerNorm(8)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Residual(8, 8), norm, torch.nn.Linear(8, 2))
        >>> plan = pr.plan(model, torch.randn(2, 4), pr.Recipe(granularity=pr.Width()), target=pr.Sparsity(0.5))
        >>> pr.shrink(model, plan)[2].normalized_shape
        (4,)

    Use: wide transformers, with recovery afterwards. Avoid: one shot without recovery, since every layer loses inputs.
    """

    reduce: Reduce = Reduce.SUM
    kind: ClassVar[Kind] = "width"


@granularity(source="Lu et al. 2024, arXiv:2402.14800; Lasby et al. 2025, arXiv:2510.13999")
@dataclass(frozen=True)
class Expert:
    """Experts of a mixture, with their columns of the router. The router then chooses among the kept experts.

    At least as many experts are kept as the router chooses for a token. reduce: as for `Channel`.

    Example:

        >>> import torch, prunella as pr
        >>> class Mixture(torch.nn.Linear):  # its own weight is the router's
        ...     def forward(self, x):
        ...         weights, index = super().forward(x).topk(2, -1)
        ...         return torch.einsum("tk,tkoi,ti->to", weights, self.experts[index], x)
        >>> mixture = Mixture(6, 4)
        >>> mixture.experts = torch.nn.Parameter(torch.randn(4, 6, 6))
        >>> plan = pr.plan(mixture, torch.randn(8, 6), pr.Recipe(granularity=pr.Expert()), target=pr.Sparsity(0.5))
        >>> pr.shrink(mixture, plan).experts.shape
        torch.Size([2, 6, 6])

    Use: mixtures whose memory is the problem. Avoid: routers that use all experts evenly.
    """

    reduce: Reduce = Reduce.SUM
    kind: ClassVar[Kind] = "expert"


@granularity(source="Abdaoui et al. 2020, arXiv:2010.05609; Ushio et al. 2023, arXiv:2305.15020")
@dataclass(frozen=True)
class Vocabulary:
    """Rows of the token embedding, and of everything indexed by tokens. Tokens that the model names are kept too.

    There is no ranking: `tokens` decides. The smaller model has new token ids: see `Plan.renumber`.
    tokens: ids of the kept tokens, each at least 0.

    Use: small models with a large vocabulary, for texts of one language or domain. Avoid: open-ended text, since a
    removed token cannot be read.
    """

    tokens: tuple[int, ...]
    kind: ClassVar[Kind] = "vocabulary"

    def __post_init__(self) -> None:
        if not self.tokens or any(type(token) is not int or token < 0 for token in self.tokens):
            todo = "pass the token ids of your texts: Vocabulary(tuple(sorted(set(ids))))"
            raise RequestError("Vocabulary(tokens=) takes ids of kept tokens", "ids are whole numbers from 0 up", todo)


@granularity(
    source="Fan et al. 2020, arXiv:1909.11556; Men et al. 2024, arXiv:2403.03853; arXiv:2403.17887", status="stable"
)
@dataclass(frozen=True)
class Depth:
    """Residual blocks: modules of a list whose output is their input plus something.

    The data flow identifies the blocks. A removed block leaves its list, and indices and counts of blocks are updated.
    The score of a block covers all parameters that only this block has, for any scope of the criterion. reduce: as for
    `Channel`; with the sum larger blocks score higher, `Reduce.MEAN` makes blocks of different sizes comparable.

    Example:

        >>> import torch, prunella as pr
        >>> class Residual(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x).relu()
        >>> blocks = torch.nn.Sequential(*(Residual(8, 8) for _ in range(4)))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), blocks, torch.nn.Linear(8, 2))
        >>> plan = pr.plan(model, torch.randn(2, 4), pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.5))
        >>> len(pr.shrink(model, plan)[1])
        2

    Use: latency of deep networks at batch 1, since fewer layers run. Avoid: shallow networks, or pruning without
    recovery.
    """

    reduce: Reduce = Reduce.SUM
    kind: ClassVar[Kind] = "block"


def reduce_to_units(parts: Sequence[tuple[Tensor, Tensor]], units: int, reduce: Reduce) -> Scores:
    """One score per unit from parts `(values (positions, weights), unit (positions,))`, in float64.

    units: number of units. reduce: the reduction of the weights of a unit.
    """
    if reduce is Reduce.MAX:
        top = torch.full((units,), -torch.inf, dtype=torch.float64, device="cpu")
        for values, unit in parts:
            top.scatter_reduce_(0, unit, values.amax(1).double(), "amax")
        return top
    total = torch.zeros(units, dtype=torch.float64, device="cpu")
    count = torch.zeros(units, dtype=torch.float64, device="cpu")
    for values, unit in parts:
        total.index_add_(0, unit, values.sum(1, dtype=torch.float64))
        count.index_add_(0, unit, torch.full(unit.shape, float(values.shape[1]), dtype=torch.float64, device="cpu"))
    return total / count.clamp_min(1) if reduce is Reduce.MEAN else total
