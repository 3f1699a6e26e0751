"""Proximal operators, which make exact zeros, and `Proximal`, which applies them after every optimizer step."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.unwrap import bare_optimizer
from prunella.registry.method import training
from prunella.train.penalty.units import CoupledUnits, Named, Units


@training(source="Tibshirani 1996, doi:10.1111/j.2517-6161.1996.tb02080.x; Daubechies et al. 2004, arXiv:math/0307152")
def soft_threshold(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold, the proximal operator of the L1 norm.

    `soft_threshold(w, t) = sign(w) max(|w| - t, 0)`, the minimizer over v of `(v - w)^2 / 2 + t |v|`. Any shape.
    Data: none. threshold: from 0 up, in units of the weight: learning rate times strength.
    Caveats: the remaining weights are too small by the threshold; fine-tune without the penalty at the end.

    Example:

        >>> import torch, prunella as pr
        >>> pr.train.soft_threshold(torch.tensor([-1.0, 0.25, 0.75]), 0.5)
        tensor([-0.5000,  0.0000,  0.2500])

    Use: exact zeros of single weights in training. Avoid: structure: use `group_soft_threshold`.
    """
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


@training(source="Yuan and Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x; Wen et al. 2016, arXiv:1608.03665")
def group_soft_threshold(groups: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold of whole groups, the proximal operator of the group lasso.

    `w_g max(1 - t sqrt(p) / ||w_g||, 0)` for each row `w_g` of p weights: zero exactly if `||w_g|| <= t sqrt(p)`.
    groups `(groups, p)`. Data: none. threshold: from 0 up: learning rate times strength.

    Example:

        >>> import torch, prunella as pr
        >>> pr.train.group_soft_threshold(torch.tensor([[3.0, 4.0], [0.1, 0.1]]), 1.0)
        tensor([[2.1515, 2.8686],
                [0.0000, 0.0000]])

    Use: exact zeros of whole groups. Avoid: zeros inside groups as well: use `sparse_group_soft_threshold`.
    """
    return groups * shrinkage(groups.square().sum(1), groups.shape[1] ** 0.5 * threshold).unsqueeze(1)


@training(source="Simon et al. 2013, doi:10.1080/10618600.2012.681250")
def sparse_group_soft_threshold(groups: Tensor, l1: float, group: float) -> Tensor:
    """Soft threshold of weights, then of groups: the proximal operator of the sparse group lasso.

    `group_soft_threshold(soft_threshold(w, l1), group)` is the exact minimizer of
    `||v - w||^2 / 2 + l1 |v|_1 + group sqrt(p) ||v||`; the other order is not. groups `(groups, p)`. Data: none.
    l1, group: from 0 up.

    Example:

        >>> import torch, prunella as pr
        >>> pr.train.sparse_group_soft_threshold(torch.tensor([[3.0, 4.0], [0.1, 0.1]]), 1.0, 0.5)
        tensor([[1.6078, 2.4117],
                [0.0000, 0.0000]])

    Use: few groups, and few weights in each group. Avoid: only one kind of zeros: use one of the other two operators.
    """
    return group_soft_threshold(soft_threshold(groups, l1), group)


def shrinkage(squares: Tensor, radius: float | Tensor) -> Tensor:
    """`max(1 - radius / norm, 0)` from squared norms; 0 where the norm is 0."""
    norm = squares.sqrt()
    return torch.where(norm > radius, 1 - radius / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@training(source="Wen et al. 2016, arXiv:1608.03665; Simon et al. 2013; Parikh and Boyd 2014, doi:10.1561/2400000003")
class Proximal:
    """Proximal gradient descent: after every optimizer step, thresholds make weights or coupled units exactly zero.

    With the learning rate `lr` of each parameter: `w = soft_threshold(w, lr * l1)` on every layer's weights, then
    `w_u = w_u max(1 - lr * group * sqrt(p) / ||w_u||, 0)` for every coupled unit (producer rows, bias, scale and shift
    of its normalization, consumer columns; p weights in total). Both together are the sparse group lasso. `plan_zeros`
    and `shrink` then remove the zero units exactly.

        with Proximal(model, optimizer, coupled_units(model, batch), group=1e-2):
            train(model, optimizer)

    l1, group: from 0 up; usual 1e-4 to 1e-1 with lr * steps of about 10.
    min_units: kept units of every group, at least 1: the largest units are never made zero.

    Data: none of its own. A weight is in the unit of its row and in the unit of its column. Groups are treated one
    after the other: the result is the composition of the operators, not the operator of the sum, but zeros stay zeros.
    Where the learning rates in a unit differ, the largest one is used. With Adam the threshold uses the plain learning
    rate.

    Use: training or fine-tuning toward exactly removable structure. Avoid: an exact budget: `Proximal` has no target.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        units: CoupledUnits,
        *,
        l1: float = 0.0,
        group: float = 0.0,
        min_units: int = 1,
    ) -> None:
        if not (l1 >= 0 and group >= 0 and l1 + group > 0 and min_units >= 1):
            why = f"found l1={l1:g}, group={group:g}, min_units={min_units}"
            raise RequestError("Proximal needs a positive strength", why, "for example group=1e-2")
        self.units, self.l1, self.group, self.min_units = units, l1, group, min_units
        self._named = units.named(model)
        optimizer = bare_optimizer(optimizer)
        trained_by(optimizer, self._named)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Remove the hook; the weights stay as they are."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rate = rates(optimizer, self._named)
        for layer in self.units.layers if self.l1 else ():
            weight = self._named[layer.entity]
            weight.copy_(soft_threshold(weight, rate[layer.entity] * self.l1))
        for units in self.units.groups if self.group else ():
            step = max(rate[part.name] for part in units.slices)
            shrink_units_(units, self._named, step * self.group, self.min_units)


def shrink_units_(units: Units, named: Named, threshold: float, min_units: int = 1) -> None:
    """The group operator on the coupled units of one group, in place; the `min_units` largest units are never zero."""
    squares = units.squares(named)
    factor = shrinkage(squares, threshold * units.weights.to(squares).sqrt())
    if int((factor > 0).sum()) < min_units:
        factor[squares.sort(descending=True, stable=True).indices[:min_units]] = 1
    units.scale_(named, factor)


def trained_by(optimizer: Optimizer, named: Named) -> None:
    """RequestError unless the optimizer trains all of these parameters."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    untrained = next((name for name, parameter in named.items() if id(parameter) not in trained), None)
    if untrained:
        raise RequestError(
            f"the optimizer does not train {untrained}",
            "a unit becomes zero as a whole, so that all its weights must be trained",
            "make the optimizer from model.parameters(), or leave the group out with skip=",
        )


def rates(optimizer: Optimizer, named: Named) -> dict[str, float]:
    """The present learning rate of each parameter."""
    by_id = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in named.items()}
