"""Criteria without data: functions of the parameters alone."""

from __future__ import annotations

import torch

from prunella.errors import RequestError
from prunella.registry.criterion import criterion
from prunella.types import Noise, NormScale, Saliency, Scores, UnitWeight, Weight


@criterion(
    source="Janowsky 1989, doi:10.1103/PhysRevA.39.6600; Han et al. 2015, arXiv:1506.02626; Li et al. 2017",
    status="stable",
)
def magnitude(weight: Weight, *, p: int = 1) -> Saliency:
    """Absolute value of a weight, or its square.

    `S_ij = |W_ij|^p`, so that a filter scores its L1 norm (p=1, Li et al.) or its squared L2 norm (p=2).
    Data: none. p: 1 or 2. Caveats: inputs of the weight are ignored; a filter before a normalization has an arbitrary
    scale.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> pr.magnitude(weight)
        tensor([[1.0000, 3.0000],
                [0.5000, 2.0000]])

    Use: masks, and as the baseline of every comparison. Avoid: channels before a normalization, whose scale is
    arbitrary.
    """
    if p not in (1, 2):
        raise RequestError(f"magnitude takes p=1 or p=2, not {p!r}", "p is the power of |w|", "use p=1")
    return weight.abs() if p == 1 else weight.square()


@criterion(source="Fang et al. 2023, arXiv:2301.12900", scope="group", status="stable")
def group_norm(unit_weight: UnitWeight, *, p: float = 2.0, normalize: bool = True) -> Scores:
    """Norm of all weights that are removed with a unit: producer rows, biases, normalization, consumer columns.

    `s_u = (sum_{w in u} |w|^p)^(1/p)`, divided by `size^(1/p)` if normalized, so that the size of a group does not
    bias a ranking over groups. Data: none. p: at least 1. A unit of zeros ranks last.

    Use: rankings over groups of different size, no data. Avoid: layers with an arbitrary scale, as before a
    normalization.
    """
    if p < 1:
        raise RequestError(f"group_norm takes p of at least 1, not {p!r}", "p is the order of the norm", "use p=2")
    size = unit_weight.shape[1] if normalize else 1
    norm: Scores = torch.linalg.vector_norm(unit_weight, ord=p, dim=1)
    return torch.div(norm, float(size) ** (1 / p))


@criterion(source="Liu et al. 2017, arXiv:1708.06519", status="stable")
def bn_scale(norm_scale: NormScale) -> Scores:
    """Scale of the batch normalization that follows a channel (network slimming).

    `s_u = |gamma_u|`, the mean where several normalizations act on a unit. Data: none. The paper trains with an L1
    penalty on gamma first; without it the ranking is weak. Groups without a normalization are not scored.

    Example:

        >>> import torch, prunella as pr
        >>> pr.criteria.bn_scale(torch.tensor([-0.5, 2.0])).tolist()
        [-0.5, 2.0]

    Use: after training with a penalty on the scales. Avoid: networks trained without the penalty.
    """
    return norm_scale


@criterion(source="He et al. 2019, arXiv:1811.00250", status="stable")
def geometric_median(weight: Weight) -> Scores:
    """Distance of a filter to the other filters of its layer: redundant filters score low (FPGM).

    `s_j = sum_k ||W_j - W_k||_2`, one number per output row. Data: none. Either of two equal filters can
    replace the other, even if both are large. Takes `out^2 * in` operations per layer.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
        >>> [round(score, 2) for score in pr.criteria.geometric_median(weight).tolist()]
        [5.1, 5.1, 10.2]

    Use: layers with many similar filters, no data. Avoid: very wide layers, where `out^2 * in` is too slow.
    """
    rows = weight.double()
    return torch.cdist(rows, rows).sum(1)


@criterion(source="Mittal et al. 2018, arXiv:1801.10447")
def random(noise: Noise) -> Saliency:
    """Uniform random scores: the baseline of every criterion.

    `s ~ U[0, 1)` for each unit, or each weight, drawn from the recipe's seed. Data: none.

    Use: as the control of a criterion. Avoid: all other uses.
    """
    return noise
